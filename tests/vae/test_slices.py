"""A decode in slices: the same pixels as ComfyUI's decoder, less memory, nothing left behind."""

import pytest
import torch
import vaes
from comfy.ldm.wan.vae import Decoder3d
from skein.bench.vae_memory import FAMILIES, GIB, counted, ways
from skein.plan import DecodeConfig
from skein.vae import deferred
from skein.vae.decode import decode
from skein.vae.deferred import Away, Deferred, Local, UsedAgain, Whole, plain, step_of, used_up, window
from skein.vae.slices import Carried, computing_in_slices
from skein.vae.whole import frames_in_slices
from torch import nn
from torch.nn import functional

TOLERANCE = 3e-5  # of the largest difference (here 0.9e-5); frames have a deviation of 0.1 to 1
# (B, T, H, W) of the latent: one frame, odd sizes, several chunks, a batch.
SHAPES = [(1, 1, 2, 5), (1, 3, 3, 5), (1, 4, 7, 2), (2, 5, 2, 4)]
ROWS = {
    "1": lambda height: 1,
    "7": lambda height: 7,
    "half": lambda height: (height + 1) // 2,
    "all": lambda height: height,
}
newer = pytest.mark.skipif(
    not hasattr(Decoder3d, "run_up"),
    reason="Wan's decoder of this ComfyUI looks at frames that have left it, and goes on in tiles",
)
WAN = pytest.param("Wan 2.1", marks=newer)
TILES = dict(tile_size=64, overlap=16, temporal_size=8, temporal_overlap=4)


def nothing(*_):
    pass


@pytest.fixture
def rows(monkeypatch):
    """Sets how many rows of a layer are computed at a time."""

    def set_to(count):
        monkeypatch.setattr(deferred, "rows_of", lambda row, height: min(height, count(height)))

    return set_to


@pytest.mark.parametrize("name", vaes.FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slices_of_any_size_are_the_whole_frame(name, shape, rows):
    model, z = vaes.build(name), vaes.latent(name, shape)
    stock = model.decode(z)
    for count in ROWS.values():
        rows(count)
        with computing_in_slices(model.decoder, nothing):
            out = plain(model.decode(z))
        assert out.shape == stock.shape and float((out - stock).abs().max()) < TOLERANCE
    assert torch.equal(model.decode(z), stock)


@pytest.mark.parametrize("name", vaes.FAMILIES)
def test_nothing_is_left_behind_and_an_interrupt_comes_between_slices(name, rows):
    rows(ROWS["1"])
    model, z = vaes.build(name), vaes.latent(name, (1, 3, 3, 4))
    stock, attributes, calls = model.decode(z), [dict(vars(module)) for module in model.modules()], []

    def interrupt():
        calls.append(1)
        if len(calls) == 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), computing_in_slices(model.decoder, interrupt):
        model.decode(z)
    convolutions = sum(isinstance(module, nn.Conv3d) for module in model.decoder.modules())
    assert convolutions < 200  # so it came in the middle of one, or of a later chunk
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(model.decode(z), stock)


def test_frames_leave_as_they_are_decoded_and_are_not_used_again(rows):
    rows(ROWS["7"])
    model, z, taken = vaes.build("HunyuanVideo"), vaes.latent("HunyuanVideo", (1, 4, 3, 4)), []
    with computing_in_slices(model.decoder, nothing, taken.append):
        out = model.decode(z)
    assert [part.shape[2] for part in taken] == [5, 8] and out.shape[2] == 13
    assert float((torch.cat(taken, 2) - model.decode(z)).abs().max()) < TOLERANCE
    with pytest.raises(UsedAgain, match="used once more"):
        out + 1


@pytest.mark.parametrize("name", ["HunyuanVideo", "HunyuanVideo 1.5", WAN])
def test_carried_frames_may_wait_on_the_host(name, rows, monkeypatch):
    rows(ROWS["7"])
    model, z, away = vaes.build(name), vaes.latent(name, (1, 5, 3, 4)), []
    stock = model.decode(z)
    monkeypatch.setattr("skein.vae.slices.Away", lambda frames, host: away.append(host) or Away(frames, host))
    for room in (1 << 30, 100_000, 0):
        keep = Carried(room)
        away.clear()
        with computing_in_slices(model.decoder, nothing, None, keep):
            out = plain(model.decode(z))
        assert float((out - stock).abs().max()) < TOLERANCE
        assert keep.room == room  # none is left
        if name != "Wan 2.1":  # which keeps all of its activations
            assert bool(away) == (room < 1 << 30) and (room or len(away) >= 2 * 20)


def test_carried_frames_use_the_hosts_memory_again_that_no_others_have():
    keep, frames = Carried(0), torch.randn(1, 2, 3, 4, 5)
    first = keep(frames)
    second = keep(-frames)
    place = first.host.data_ptr()
    assert second.host.data_ptr() != place and torch.equal(_values(first), frames)
    del first
    assert keep(frames[:, :1]).host.data_ptr() != place  # of another shape
    again = keep(2 * frames)
    assert again.host.data_ptr() == place and torch.equal(_values(again), 2 * frames)
    assert torch.equal(_values(second), -frames)


def _values(step):
    return window(step, (0, step.shape[2]), (0, step.shape[3]), step.host)


# GiB of live tensors, 17 frames of 720p in 16 bits, beside the weights: as ComfyUI decodes; in slices at most;
# with carried frames on the host.
PEAKS = {"HunyuanVideo": (19.4, 12.6, 6.5), "HunyuanVideo 1.5": (13.0, 12.1, 6.2), "Wan 2.1": (6.0, 5.6, 5.6)}


@pytest.mark.parametrize("name", ["HunyuanVideo", "HunyuanVideo 1.5", WAN])
def test_peak_of_live_bytes_at_720p(name):
    expected, most, least = PEAKS[name]
    with torch.device("meta"):
        model = FAMILIES[name]().bfloat16().eval()
        frame = (45, 80) if name == "HunyuanVideo 1.5" else (90, 160)
        latent = torch.empty(1, vaes.FAMILIES[name][1], 5, *frame, dtype=torch.bfloat16)
        within = ways(model.decoder)
        assert counted(model, latent, within["ComfyUI"]).peak / GIB == pytest.approx(expected, abs=0.1)
        assert counted(model, latent, within["Skein, in slices"]).peak / GIB < most
        assert counted(model, latent, within["Skein, carried frames on the host"]).peak / GIB < least


def test_memory_is_used_again_only_where_nobody_else_has_it(rows):
    rows(ROWS["1"])
    x = torch.randn(1, 2, 3, 5, 4)

    def twice():
        """A tensor of ours, and the same noted to be doubled."""
        own = Deferred(Whole(x.clone()), x)
        return own, Deferred(Local(lambda out, x: torch.mul(x, 2, out=out), 2, step_of(own)), x)

    own, noted = twice()
    place = own.step.tensor.data_ptr()
    assert used_up(noted).data_ptr() != place and torch.equal(plain(own), x)
    own, noted = twice()
    place = own.step.tensor.data_ptr()
    del own
    out = used_up(noted)
    assert out.data_ptr() == place and torch.equal(out, 2 * x)
    with pytest.raises(UsedAgain, match="used once more"):
        noted + 1
    theirs = x.clone()
    noted = Deferred(Local(lambda out, x: torch.mul(x, 2, out=out), 2, step_of(theirs)), x)
    assert used_up(noted).data_ptr() != theirs.data_ptr() and torch.equal(theirs, x)


def test_what_is_not_noted_is_computed_at_once(rows):
    rows(ROWS["half"])
    x = torch.randn(1, 2, 3, 5, 4)
    noted = functional.silu(Deferred(step_of(x), x))
    assert isinstance(noted, Deferred) and type(noted * 2) is torch.Tensor
    expected = functional.silu(x)
    for change in (
        lambda x: x * 2,
        lambda x: x.permute(0, 2, 1, 3, 4).reshape(3, -1),
        lambda x: functional.pad(x, (1, 2, 0, 1, 2, 0), mode="replicate"),
        lambda x: functional.pad(x, (1, 2)),
        lambda x: functional.pad(x, (1, 1, 1, 1, 1, 1), mode="reflect"),
        lambda x: functional.interpolate(x, scale_factor=(2.0, 3.0, 1.0), mode="nearest")[:, :, 1:4],
        lambda x: functional.interpolate(x, scale_factor=1.5, mode="nearest"),
        lambda x: torch.cat([x[:, :, 1:], expected, x], dim=2)[:, :, -4:].clone(),
        lambda x: torch.cat([x, x], dim=1),
        lambda x: torch.add(x, expected, alpha=2) + x + x[:, :, :1],
    ):
        torch.testing.assert_close(plain(change(functional.silu(Deferred(step_of(x), x)))), change(expected))


@newer
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_vae_in_slices_is_vae_decode(shape, monkeypatch):
    monkeypatch.setattr(deferred, "SLICE", 1 << 14)
    vae, told = vaes.vae(), []
    latent = vaes.latent("Wan 2.1", shape)
    frames, stock = frames_in_slices(vae, latent, nothing, told.append, 0), vae.decode(latent)
    assert frames.shape == stock.shape and frames.dtype == stock.dtype
    assert float((frames - stock).abs().max()) < TOLERANCE and sum(told) == stock.shape[0] * stock.shape[1]


@newer
def test_whole_then_slices_then_tiles(monkeypatch, caplog):
    """Which fit is decided by the estimates; on an out of memory the next one follows."""
    vae, latent = vaes.vae(), vaes.latent("Wan 2.1", (1, 3, 4, 4))
    stock, tried = vae.decode(latent), []

    def room_for(*fitting):
        monkeypatch.setattr("skein.vae.decode.whole_bytes", lambda *_: 0 if "whole" in fitting else 1 << 60)
        monkeypatch.setattr("skein.vae.decode.sliced_bytes", lambda *_: (0 if "slices" in fitting else 1 << 60, 0))

    def full(name):
        def run_out(*_):
            tried.append(name)
            raise torch.OutOfMemoryError("for the test")

        return run_out

    def told(mode):
        caplog.clear()
        with caplog.at_level("INFO", logger="skein"):
            frames = decode(vae, latent, DecodeConfig(mode, "cpu", **TILES))
        said = caplog.records[-1].getMessage()
        assert ("tiles" in said) == (float((frames - stock).abs().max()) > 1e-3)
        return said.removeprefix("Skein VAE: ").split(" on cpu")[0]

    expected = {
        ("whole", "slices"): ("whole", "whole"),
        ("slices",): ("whole, in slices", "whole, in slices"),
        (): ("in tiles", "whole, in slices"),
    }
    for fitting, answers in expected.items():
        room_for(*fitting)
        assert (told("auto"), told("whole")) == answers
        assert told("tiled") == "in tiles"
    room_for("whole", "slices")
    monkeypatch.setattr("skein.vae.decode.frames_of", full("whole"))
    assert told("auto") == "whole, in slices, because memory ran out when whole,"
    monkeypatch.setattr("skein.vae.decode.frames_in_slices", full("slices"))
    tried.clear()
    assert told("auto") == "in tiles, because memory ran out when whole," and tried == ["whole", "slices"]


@newer
def test_a_decoder_of_another_form_goes_on_in_tiles(monkeypatch):
    """One that looks at frames which have left it, as Wan's of older ComfyUIs does."""
    vae, latent = vaes.vae(), vaes.latent("Wan 2.1", (1, 3, 4, 4))
    decoder = vae.first_stage_model.decoder
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda *args, **kwargs: [each + 0 for each in forward(*args, **kwargs)])
    monkeypatch.setattr("skein.vae.decode.whole_bytes", lambda *_: 1 << 60)
    monkeypatch.setattr("skein.vae.decode.sliced_bytes", lambda *_: (0, 0))
    tiled = decode(vae, latent, DecodeConfig("tiled", "cpu", **TILES))
    assert torch.equal(decode(vae, latent, DecodeConfig("auto", "cpu", **TILES)), tiled)
