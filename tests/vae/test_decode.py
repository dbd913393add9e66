"""The node's call: on one device, in real worker processes on the CPU, whole and in tiles; faults, refusals."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import comfy.model_management as memory
import comfy.utils
import pytest
import torch
import vaes
from random_checkpoints import SMALL, random_model, text
from skein import engine
from skein.bench.errors import relative_error
from skein.demo.sampling import sample
from skein.nodes.vae import VAEDecodeNode
from skein.plan import DecodeConfig, ParallelConfig
from skein.vae.decode import _devices, decode
from skein.vae.shared import workers
from skein.vae.tiles import tiling_of
from skein.vae.whole import frames_of
from skein.workers import GroupError, group, in_use, release

TOLERANCE = 1e-4
TILES = dict(tile_size=64, overlap=16, temporal_size=8, temporal_overlap=4)
FRAMES = (2, 2, 3, 4)  # B, T, H, W of the latent


@pytest.fixture(scope="module", autouse=True)
def _no_workers_left():
    yield
    release()


@pytest.fixture(scope="module")
def wan():
    with torch.inference_mode():
        return vaes.vae()


@pytest.fixture(scope="module")
def latent():
    with torch.inference_mode():
        return vaes.latent("Wan 2.1", FRAMES)


def difference(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a - b).abs().max())


def stock_tiled(vae, latent, config):
    """As ComfyUI's node VAE Decode (Tiled) calls it."""
    tiling = tiling_of(vae, config)
    (frames, tile, _), (shared, overlap, _) = tiling.tile, tiling.overlap
    return vae.decode_tiled(latent, tile_x=tile, tile_y=tile, overlap=overlap, tile_t=frames, overlap_t=shared)


@pytest.fixture
def bar(monkeypatch):
    """What progress bars are told: [value, total]."""
    told = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: told.append((value, total))
    )  # fmt: skip
    return told


@pytest.mark.parametrize("devices", ["all", "cpu", "cpu,cpu", "cpu,cpu,cpu"])
def test_the_node_gives_what_vae_decode_gives(wan, latent, devices, bar, monkeypatch):
    monkeypatch.setattr(VAEDecodeNode, "hidden", SimpleNamespace(unique_id=None))
    stock, sizes = wan.decode(latent), dict(tile_size=512, overlap=64, temporal_size=64, temporal_overlap=8)
    for mode in ("auto", "whole"):
        images = VAEDecodeNode.execute({"samples": latent}, wan, mode=mode, devices=devices, **sizes)[0]
        assert difference(images, stock.flatten(0, 1)) < TOLERANCE
        assert bar[-1] == (10, 10)
    assert torch.equal(wan.decode(latent), stock)


@pytest.mark.parametrize("devices", ["all", "cpu,cpu"])
def test_tiles_are_comfyuis_tiles(wan, latent, devices, bar):
    wide = vaes.latent("Wan 2.1", (1, 3, 9, 5))
    config = DecodeConfig("tiled", devices, **TILES)
    stock = stock_tiled(wan, wide, config)
    tiled = decode(wan, wide, config)
    assert difference(tiled, stock) < TOLERANCE and bar[-1][0] == bar[-1][1] == 4
    assert difference(tiled, wan.decode(wide)) > 1e-2  # there were tiles
    assert torch.equal(stock_tiled(wan, wide, config), stock)


def test_hunyuanvideo_at_its_real_width():
    vae, latent = vaes.vae("HunyuanVideo"), vaes.latent("HunyuanVideo", (1, 2, 2, 3))
    stock = vae.decode(latent)
    for mode, devices in (("whole", "cpu"), ("whole", "cpu,cpu"), ("tiled", "cpu,cpu")):  # one tile
        assert difference(decode(vae, latent, DecodeConfig(mode, devices)), stock) < TOLERANCE


def test_the_group_that_samples_also_decodes_and_stays_warm(wan, latent, tmp_path):
    model, parallel = random_model(tmp_path, 2), ParallelConfig("cpu,cpu")
    expected, stock = sample(model, text(7), **SMALL), wan.decode(latent)
    pids = []
    for _ in range(2):
        out = sample(engine.edit(model, parallel=parallel), text(7), **SMALL)
        assert relative_error(out, expected) < 2e-6
        pids.append(dict(group._group.pids))
        assert difference(decode(wan, latent, DecodeConfig()), stock) < TOLERANCE  # "all": where there are workers
        pids.append(dict(group._group.pids))
        # ComfyUI asks for a part of the model's memory, as before a decode of its own.
        holder, loaded = group._group.models.last.proxy, memory.current_loaded_models
        (proxy,) = [entry for entry in loaded if vars(entry.model.model).get("_skein_proxy") is holder]
        assert proxy.model_loaded_memory() > 1e6
        assert not proxy.model_unload(0) and proxy.model_loaded_memory() == 0
    assert all(each == pids[0] for each in pids)
    memory.unload_all_models()  # and for all of it, which ends them
    assert group._group is None


def test_another_vae_takes_the_place_of_the_one_before(wan, latent):
    other = vaes.vae()
    for parameter in other.first_stage_model.decoder.head.parameters():
        parameter.data *= 0.5
    for vae in (wan, other, wan):
        assert difference(decode(vae, latent, DecodeConfig("whole", "cpu,cpu")), vae.decode(latent)) < TOLERANCE


@pytest.mark.parametrize(("mode", "rank"), [("whole", 0), ("tiled", 1)])
def test_a_rank_killed_in_the_middle_of_a_decode(wan, latent, mode, rank):
    config = DecodeConfig(mode, "cpu,cpu", tile_size=128, overlap=32)
    long = vaes.latent("Wan 2.1", (1, 5, 32, 32))
    decode(wan, latent, config)
    pid, killed = group._group.pids[rank], []

    def kill():
        os.kill(pid, signal.SIGKILL)
        killed.append(time.monotonic())

    threading.Timer(1.0, kill).start()
    with pytest.raises(GroupError, match=f"Worker {rank} .*ended without a message"):
        decode(wan, long, config)
    assert time.monotonic() - killed[0] < 5
    assert difference(decode(wan, latent, DecodeConfig("whole", "cpu,cpu")), wan.decode(latent)) < TOLERANCE


def test_a_part_of_a_batch_in_tiles(wan):
    """As RebatchLatents cuts it: its values do not come first in memory."""
    config, part = DecodeConfig("tiled", "cpu,cpu", **TILES), vaes.latent("Wan 2.1", (2, 3, 12, 16))[1:2]
    assert difference(decode(wan, part, config), stock_tiled(wan, part, config)) < TOLERANCE


def test_an_interrupt_between_two_answers_loses_none(wan, latent, monkeypatch):
    config = DecodeConfig("whole", "cpu,cpu")
    decode(wan, latent, config)
    workers = group._group

    def interrupt_once():
        if [(asked.kind, len(asked.answers)) for asked in workers.conversation.pending] == [("decode_strip", 1)]:
            monkeypatch.undo()
            raise memory.InterruptProcessingException

    monkeypatch.setattr(workers.conversation, "_check_interrupt", interrupt_once)
    with pytest.raises(memory.InterruptProcessingException):
        decode(wan, latent, config)
    assert difference(decode(wan, latent, config), wan.decode(latent)) < TOLERANCE and group._group is workers


def test_workers_released_in_the_middle_of_a_decode(wan, latent):
    config = DecodeConfig("whole", "cpu,cpu")
    decode(wan, latent, config)
    threading.Timer(0.5, release).start()
    with pytest.raises(GroupError, match="were released while they were at work"):
        decode(wan, vaes.latent("Wan 2.1", (1, 5, 32, 32)), config)
    assert difference(decode(wan, latent, config), wan.decode(latent)) < TOLERANCE


def test_gpus_are_left_alone_where_they_cannot_decode_together(monkeypatch):
    """There are two GPUs, which cannot be here."""
    on_cpu, on_gpu = (SimpleNamespace(device=torch.device(*device)) for device in (("cpu",), ("cuda", 0)))
    release()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    assert _devices(on_gpu, DecodeConfig(devices="all")) == ("0", "1")
    assert _devices(on_cpu, DecodeConfig(devices="all")) is None
    sampling = SimpleNamespace(setting=SimpleNamespace(devices=("0",)))
    with monkeypatch.context() as one_worker:  # others would end it, and it them
        one_worker.setattr("skein.vae.decode.running_group", lambda: sampling)
        assert _devices(on_gpu, DecodeConfig(devices="all")) is None
    with monkeypatch.context() as machines:
        machines.setenv("SKEIN_NNODES", "2")
        machines.setenv("SKEIN_RDZV_ENDPOINT", "127.0.0.1:29500")
        assert _devices(on_gpu, DecodeConfig(devices="all")) is None
    with pytest.raises(ValueError, match="--cpu-vae"):
        _devices(on_cpu, DecodeConfig(devices="0,1"))
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    assert _devices(on_gpu, DecodeConfig(devices="all")) is None
    with pytest.raises(ValueError, match="need NCCL"):
        vae = SimpleNamespace(patcher=SimpleNamespace(patches={}), first_stage_model=torch.nn.Identity())
        workers(_devices(on_gpu, DecodeConfig(devices="0,1")), vae)


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_an_interrupt_is_seen_within_a_second(wan, latent, devices):
    stock, pressed, used = wan.decode(latent), [], []

    def press():
        used.append(in_use())
        pressed.append(time.monotonic())
        memory.interrupt_current_processing(True)

    config, long = DecodeConfig("whole", devices), vaes.latent("Wan 2.1", (1, 5, 32, 32))
    decode(wan, latent, config)
    threading.Timer(0.5, press).start()
    with pytest.raises(memory.InterruptProcessingException):
        decode(wan, long, config)
    assert time.monotonic() - pressed[0] < 1 and [*used, in_use()] == [devices == "cpu,cpu", False]
    memory.interrupt_current_processing(False)
    assert difference(decode(wan, latent, config), stock) < TOLERANCE


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_without_memory_for_the_whole_it_decodes_in_tiles(wan, latent, devices, monkeypatch, caplog):
    def full(*_):
        raise torch.OutOfMemoryError("for the test")

    with caplog.at_level("INFO", logger="skein"):
        monkeypatch.setattr("skein.vae.decode.whole_bytes", lambda *_: 1 << 60)
        monkeypatch.setattr("skein.vae.decode.sliced_bytes", lambda *_: (1 << 60, 0))
        tiled = decode(wan, latent, DecodeConfig("auto", devices, **TILES))
        assert "in tiles on cpu" in caplog.text
        monkeypatch.setattr("skein.vae.decode.frames_of", full)
        monkeypatch.setattr("skein.vae.decode.frames_in_slices", full)
        monkeypatch.setattr("skein.vae.shared.decode_strips", full)
        again = decode(wan, latent, DecodeConfig("whole", devices, **TILES))
    assert torch.equal(tiled, again) and "memory ran out" in caplog.text
    assert difference(tiled, stock_tiled(wan, latent, DecodeConfig(**TILES))) < TOLERANCE


def test_the_decoder_is_put_back_when_a_frame_cannot_be_kept(wan, latent, monkeypatch):
    """At once, whoever still holds the frames, and not when the garbage collector comes to them."""
    layers, held = list(wan.first_stage_model.decoder.modules()), []

    def holding(*arguments):
        held.append(frames_of(*arguments))
        return held[0]

    monkeypatch.setattr("skein.vae.decode.frames_of", holding)
    monkeypatch.setattr(wan, "output_device", "no such device")
    with pytest.raises(RuntimeError, match="no such device"):
        decode(wan, latent, DecodeConfig("whole", "cpu"))
    assert held and not any("_conv_forward" in vars(layer) for layer in layers)


def refused(change, config, latent, name="Wan 2.1"):
    vae = vaes.vae(name)
    for attribute, value in change.items():
        setattr(vae, attribute, value)
    with pytest.raises(ValueError) as error:
        decode(vae, latent, config)
    return str(error.value)


def test_what_cannot_be_is_refused_with_a_sentence(latent, wan):
    two, whole = DecodeConfig(devices="cpu,cpu"), DecodeConfig("whole", "cpu,cpu,cpu,cpu,cpu")
    assert "VAE Decode Audio" in refused({"latent_dim": 1}, two, latent)
    assert "single images" in refused({"latent_dim": 2}, two, latent)
    assert "name fewer" in refused({}, whole, latent)
    assert "no GPU 0, 7 here" in refused({}, DecodeConfig(devices="0,7"), latent)
    for wrong in (dict(mode="fast"), dict(devices="gpu"), dict(devices="1,1"), dict(tile_size=8), dict(overlap=-1)):
        with pytest.raises(ValueError):
            DecodeConfig(**wrong)
    assert group._group is None or group._group.alive
    assert difference(decode(wan, latent, DecodeConfig()), wan.decode(latent)) < TOLERANCE


def test_an_unknown_video_vae_is_decoded_in_tiles(latent, monkeypatch):
    vae = vaes.vae()
    monkeypatch.setattr("skein.vae.families.FAMILIES", {})
    config = DecodeConfig("auto", "cpu,cpu", **TILES)
    assert difference(decode(vae, latent, config), stock_tiled(vae, latent, config)) < TOLERANCE
    assert difference(decode(vae, latent, DecodeConfig(devices="cpu")), vae.decode(latent)) == 0
    assert "tiled" in refused({}, DecodeConfig("whole", "cpu,cpu"), latent)
    assert "tiles by itself" in refused({"handles_tiling": True}, config, latent)
