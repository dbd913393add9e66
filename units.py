"""Seconds and bytes in the form in which people say them."""


def seconds_text(seconds: float) -> str:
    if seconds >= 600:
        return f"{seconds / 60:.0f} min"
    if seconds >= 120:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def bytes_text(size: float) -> str:
    if size < 1e9:
        return f"{size / 1e6:.{0 if size >= 10e6 else 1}f} MB"
    return f"{size / 1e9:.1f} GB"
