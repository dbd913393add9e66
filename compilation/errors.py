"""What goes wrong in torch.compile: whether it is the compiler's own, and why, in words."""

from collections.abc import Callable, Iterator
from types import TracebackType

import torch
from torch import nn

from ..models.share import is_own_method

COMPILING = "torch._dynamo.convert_frame"  # on the way to every compilation, and to nothing else
TOO_MANY = "more sizes and settings have been compiled than PyTorch keeps; restart ComfyUI, or set dynamic to on"
NO_COMPILER = "PyTorch finds no C++ compiler that works; install one (g++, clang, or Visual Studio's build tools)"
NO_TRITON = "PyTorch finds no Triton for this GPU; install it (on Windows: python -m pip install triton-windows)"
FOLDER = (
    "PyTorch's folder of compiled code, {}, has a space or a letter in its path that C++ compilers may misread; "
    "start ComfyUI with TORCHINDUCTOR_CACHE_DIR set to another one"
)
FORWARD = "another node has put a forward of its own on it, which PyTorch cannot compile"
KNOWN = {
    "FailOnRecompileLimitHit": TOO_MANY,
    "InvalidCxxCompiler": NO_COMPILER,
    "TritonMissing": NO_TRITON,
}


def is_compilers(error: Exception) -> bool:
    """Whether an exception out of a compiled function comes of compiling it: nothing of it has run then."""
    return isinstance(error, torch._dynamo.exc.TorchDynamoException) or COMPILING in _modules(error.__traceback__)


def _modules(traceback: TracebackType | None) -> Iterator[str]:
    while traceback is not None:
        yield traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next


def root_of(error: Exception) -> Exception:
    """The exception that PyTorch has wrapped into others."""
    inner = getattr(error, "inner_exception", None)
    return root_of(inner) if isinstance(inner, Exception) else error


def reason(error: Exception, module: nn.Module, forward: Callable) -> str:
    """Why a module could not be compiled. forward: its own, below what this run has put on it."""
    root = root_of(error)
    name = type(root).__name__
    if name in KNOWN:
        return KNOWN[name]
    text = str(root)
    if name == "CppCompileError":
        from torch._inductor.runtime.runtime_utils import cache_dir

        folder = cache_dir()
        if not folder.isascii() or " " in folder:
            return FOLDER.format(folder)
        text = str(getattr(root, "output", text))
        name = "the C++ compiler fails"
    elif not is_own_method(module, "forward", forward) or any(map(_has_own_forward, list(module.modules())[1:])):
        return FORWARD
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = (line for line in lines if "error" in line.lower() and "http" not in line)  # not where to read more
    told = next(errors, lines[0] if lines else "")
    return f"{name}: {told[:200]}" if told else name


def _has_own_forward(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    ours = getattr(forward, "__module__", "").partition(".")[0] == __name__.partition(".")[0]
    return forward is not None and not ours and not is_own_method(module, "forward", forward)
