"""What a technique needs of a model and of this machine, said before anything is sampled."""

from collections.abc import Callable, Set
from typing import TYPE_CHECKING

from . import conflicts
from .compilation import compile_settings
from .models import Network
from .patchers import own_network
from .plan import Plan
from .quantization import require_float8, require_torchao
from .techniques import require_several_blocks
from .workers import setting_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def require(plan: Plan, techniques: Set[str], patcher: "ModelPatcher") -> None:
    """Raises ValueError if these techniques of a plan lack something: blocks that are known, a device, a package."""
    refuses = Network(own_network(patcher)).architecture.refuses if techniques else {}
    for technique in techniques & refuses.keys():
        raise ValueError(
            f"{conflicts.NAMES[technique]} cannot work with {type(own_network(patcher)).__name__} models, because "
            f"{refuses[technique]}; remove {conflicts.NAMES[technique]}."
        )
    for technique in techniques & NEEDS.keys():
        NEEDS[technique](plan, patcher)


def _needs_fp8(_plan: Plan, patcher: "ModelPatcher") -> None:
    require_torchao()
    require_float8(patcher.load_device)


def _needs_compile(plan: Plan, _patcher: "ModelPatcher") -> None:
    assert plan.compile is not None
    compile_settings(plan.compile)


def _needs_cache(_plan: Plan, patcher: "ModelPatcher") -> None:
    require_several_blocks(patcher, "First-Block Cache")


def _needs_parallel(plan: Plan, patcher: "ModelPatcher") -> None:
    require_several_blocks(patcher, "Context Parallel")
    setting_of(plan, patcher)


NEEDS: dict[str, Callable[[Plan, "ModelPatcher"], None]] = {
    "fp8": _needs_fp8,
    "compile": _needs_compile,
    "cache": _needs_cache,
    "parallel": _needs_parallel,
}
