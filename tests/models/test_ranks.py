"""Each architecture over real processes (sharing.py): equal to one process but for rounding, with the same decisions of
the cache. A token in the wrong place shows as 1e-2.
"""

import contextlib
import importlib
import itertools
from pathlib import Path

import pytest
from ranks import run_ranks
from skein.models.families import FAMILIES
from tiny_models import CASES, NOT_SHARED

SCRIPT = Path(__file__).parent / "sharing.py"


@pytest.mark.parametrize(("world", "degrees"), [(2, "2,1"), (3, "1,3")], ids=["Ulysses", "ring"])
def test_a_model_over_several_processes_is_the_same_as_in_one(world, degrees):
    done = run_ranks(SCRIPT, world, degrees)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    assert {line[0] for line in lines} == set(CASES) - set(NOT_SHARED)
    reused = 0
    for name, technique, exchanged, error, same, hits in lines:
        assert float(error) < 1e-5 and same == "True" and exchanged == "True", (name, technique)
        reused += int(hits)
    assert reused > len(CASES)


def test_each_page_has_a_case_or_a_reason():
    """CausalWanModel has a sampler of its own, which calls it frame by frame; all techniques but FP8 are refused."""
    untried = {"CausalWanModel"}
    tried = {type(case.patcher().model.diffusion_model).__mro__ for case in CASES.values()}
    names = {f"{kind.__module__}.{kind.__qualname__}" for mro in tried for kind in mro}
    for name in itertools.chain.from_iterable(architecture.networks for architecture in FAMILIES):
        module, _, kind = name.rpartition(".")
        with contextlib.suppress(ModuleNotFoundError):  # an older ComfyUI does not have all
            importlib.import_module(module)
            assert name in names or kind in untried, name
