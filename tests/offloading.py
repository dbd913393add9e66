"""A model whose weights are not on its device: the host's memory is PyTorch's meta device, and what is copied from
there is looked up."""

import skein.offloaded
import torch
from comfy.patcher_extension import WrappersMP
from skein.attributes import changed
from skein.models import Network


class Offloading:
    """A model's blocks are offloaded in each call. paths: of those blocks; None: all. log: copies begun, weights that
    came, and the blocks of `hooked` layers as these compute, in their order."""

    def __init__(self, monkeypatch):
        self.paths, self.log, self.host, self.path_of = None, [], {}, {}
        self.hooked, self.fetched = {}, []
        monkeypatch.setattr(skein.offloaded, "copy", self.copy)
        monkeypatch.setitem(skein.offloaded.COPIES, "cpu", self.copies)
        begin = skein.offloaded._Coming.begin

        def begin_logged(coming):
            self.log.extend(["begun"] if coming.pairs and coming._done is None else [])
            begin(coming)

        monkeypatch.setattr(skein.offloaded._Coming, "begin", begin_logged)

    def copy(self, target, source):
        self.fetched.append(source)
        target.copy_(self.host[source])

    def copies(self, _device):
        log = self.log

        class Copies:
            def now(self):
                return "ready"

            def copy(self, pairs, ready):
                assert ready == "ready"
                for target, source in pairs:
                    skein.offloaded.copy(target, source)
                return "done"

            def wait(self, done):
                assert done == "done"
                log.append("came")

        return Copies()

    def put_on(self, patcher):
        patcher.add_wrapper(WrappersMP.APPLY_MODEL, self)
        return patcher

    def __call__(self, executor, *args, **kwargs):
        network = executor.class_obj.diffusion_model
        paths = self.paths or [block.path for block in Network(network).blocks]
        hooks = [self._hook(path, network.get_submodule(layer)) for path, layer in self.hooked.items()]
        with changed(self._changes(network, paths)):
            try:
                return executor(*args, **kwargs)
            finally:
                assert all(weight.is_meta for path in paths for weight in network.get_submodule(path).parameters())
                for hook in hooks:
                    hook.remove()

    def _hook(self, path, layer):
        return layer.register_forward_pre_hook(lambda *_: self.log.append(path))

    def _changes(self, network, paths):
        for path in paths:
            for layer in network.get_submodule(path).modules():
                weights = {name: weight for name, weight in layer._parameters.items() if weight is not None}
                away = {name: torch.nn.Parameter(weight.to("meta"), False) for name, weight in weights.items()}
                self.host.update({away[name]: weight for name, weight in weights.items()})
                self.path_of.update(dict.fromkeys(away.values(), path))
                yield layer, "_parameters", {**layer._parameters, **away}
