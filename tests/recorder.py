"""A recorder of compiled blocks that calls a function where CUDA would run a graph (compilation/graphs.py)."""


class Again:
    """Records a function by keeping it."""

    calls: list[str] = []
    gpu_s = 0.0

    def __init__(self, device):
        assert device.type == "cpu"

    def wait(self):
        pass

    def seconds(self, replay):
        replay()
        return self.gpu_s

    def prepare(self, compute):
        self.calls.append("prepare")
        return compute()

    def record(self, compute):
        self.calls.append("record")
        compute()

        def replay():
            self.calls.append("replay")
            compute()

        return replay
