"""How full and how busy a device is. Asks the driver only: nothing here waits for the device."""

import torch


def memory_of(device: torch.device) -> tuple[int, int] | None:
    """Bytes used and in all: of a GPU by everybody, on the CPU by this process out of the machine's. None: unknown."""
    try:
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            return total - free, total
        if device.type == "cpu":
            import psutil  # ComfyUI needs it too

            return psutil.Process().memory_info().rss, psutil.virtual_memory().total
    except (ImportError, RuntimeError):
        pass
    return None


def peaks_of(device: torch.device) -> dict[str, int]:
    """Bytes on a GPU since the last question, at most: peak_bytes of tensors, reserved_bytes with what PyTorch kept for
    others to come. 0 on the CPU."""
    if device.type != "cuda":
        return {"peak_bytes": 0, "reserved_bytes": 0}
    told = {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return told


def load_of(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes used on a GPU and its utilisation in percent, from the driver's management library: also of GPUs that this
    process has not touched. None where nvidia-ml-py is not installed or does not tell."""
    if device.type != "cuda":
        return None, None
    try:
        return torch.cuda.device_memory_used(device), torch.cuda.utilization(device)
    except Exception:  # the library's errors have no base of their own, and a look must not end a run
        return None, None
