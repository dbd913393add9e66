"""What context parallelism gains over slower links: an estimate from the bytes that are exchanged. Needs no GPU.

    python3 -m bench.links [--gb-s 20] [--step-s 18.4] [--attention 0.85] [--worlds 2 4 8]

A step on N GPUs takes an N-th of one GPU's, plus the exchanges that nothing hides: Ulysses' wait for the link, a ring's
travel while attention computes, on the multiprocessors that they leave it. step-s and attention (the share of attention
in it) are to be measured on one GPU (bench.step); gb-s is what a GPU sends to its neighbours in one direction while all
do so; spare is the share of a GPU that a ring's transfers take (8 of an H100's 132 multiprocessors, where
FlashAttention-3 runs). What else a ring costs beside its kernel is left out (on two H100s 4 % of attention, by
bench/exchange.py). tests/parallel/test_links.py holds the counts of bytes against the messages that the exchanges
really send. Ends with one JSON line.
"""

import argparse
import json
from dataclasses import dataclass

HIDDEN, LAYERS = 3072, 60  # HunyuanVideo 13 B
# The article's, on NVIDIA L20: seconds of a run with the first-block cache, over those on one GPU with it.
# https://github.com/chengzeyi/ParaAttention/blob/main/doc/fastest_hunyuan_video.md
ARTICLE = {2: 2271.06 / 1132.90, 4: 2271.06 / 718.15, 8: 2271.06 / 649.23}


@dataclass(frozen=True)
class Exchange:
    """Bytes that each rank sends in one attention, and once a call.

    image, text: tokens. width: heads x head dim. ulysses, ring: degrees. size: of a value. All divisible.
    """

    image: int
    text: int
    width: int
    ulysses: int
    ring: int
    size: int = 2

    @property
    def to_heads(self) -> float:
        """Queries, keys and values of the own image tokens, of other ranks' heads."""
        return 3 * self._own * self.width * self._others * self.size

    @property
    def to_tokens(self) -> float:
        """The output for other ranks' tokens, and for the text, which all need."""
        return (self._own + self.text) * self.width * self._others * self.size

    @property
    def around(self) -> float:
        """Keys and values of a group's image tokens, of the own heads, to each other group in turn."""
        return 2 * self._own * self.width * (self.ring - 1) * self.size

    @property
    def at_the_end(self) -> float:
        """Once a call: the hidden states of the image, to all."""
        return self.image * self.width * self.size

    @property
    def _own(self) -> float:
        return self.image / (self.ulysses * self.ring)

    @property
    def _others(self) -> float:
        return (self.ulysses - 1) / self.ulysses


def step_seconds(
    exchange: Exchange, alone: float, attention: float, layers: int, bytes_s: float, spare: float = 0.0
) -> float:
    """A step on ulysses x ring GPUs, from that of one (seconds) and the share of attention in it.

    spare: the share of a GPU that attention leaves to transfers that travel meanwhile.
    """
    world = exchange.ulysses * exchange.ring
    waited = (exchange.to_heads + exchange.to_tokens) * layers + exchange.at_the_end
    # The last of the ring's parts is computed when nothing travels any more.
    beside = alone * attention / world * (exchange.ring - 1) / exchange.ring
    hiding = beside / (1 - spare)
    waited += max(exchange.around * layers - hiding * bytes_s, 0)
    return alone / world + hiding - beside + waited / bytes_s


def rows(options: argparse.Namespace) -> list[dict]:
    tokens = (options.frames + 3) // 4 * (options.height // 16) * (options.width // 16)
    found = []
    for world in options.worlds:
        times = {}
        for ring in [n for n in range(1, world + 1) if world % n == 0]:
            exchange = Exchange(tokens, options.text, HIDDEN, world // ring, ring)
            times[f"{world // ring} x {ring}"] = step_seconds(
                exchange, options.step_s, options.attention, LAYERS, options.gb_s * 1e9, options.spare
            )
        best = min(times, key=lambda name: times[name])
        found.append(
            {
                "gpus": world,
                "ulysses_x_ring": best,
                "step_s": round(times[best], 3),
                "speedup": round(options.step_s / times[best], 2),
                "each": {name: round(options.step_s / seconds, 2) for name, seconds in times.items()},
                "article_l20": round(ARTICLE[world], 2) if world in ARTICLE else None,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(width=1280, height=720, frames=129, text=256).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, number in dict(gb_s=20.0, step_s=18.4, attention=0.85, spare=8 / 132).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=number)
    parser.add_argument("--worlds", type=int, nargs="*", default=[2, 4, 8])
    options = parser.parse_args()
    found = rows(options)
    for row in found:
        print(row)
    print(json.dumps({"estimate": True, **vars(options), "rows": found}))


if __name__ == "__main__":
    main()
