"""Does every installed peer compute what it should? One small product each, and tiles of a transposable mask.

python benchmarks/check_peers.py
"""

import numpy as np

import transposable
from peers import NAMES, Peer, installed

if __name__ == "__main__":
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 96), dtype=np.float32) * (rng.random((64, 96)) < 0.1)
    for name in NAMES:
        if name not in installed():
            print(f"{name}: not installed (make bench-peers)")
            continue
        for form, x in (("planes", rng.standard_normal((96, 49), dtype=np.float32)),
                        ("linear", rng.standard_normal((16, 96), dtype=np.float32)),
                        ("linear", rng.standard_normal((1, 96), dtype=np.float32))):  # fmt: skip
            with Peer(name, 1) as peer:
                why = peer.matmul(weight, x, form)
                if why:
                    print(f"{name} {form} {x.shape}: {why}")
                    continue
                expected = weight @ x if form == "planes" else x @ weight.T
                error = np.abs(peer.output().reshape(expected.shape) - expected).max()
                print(f"{name} {form} {x.shape}: error {error:.1e}, {np.median(peer.samples(5)) * 1e6:.1f} us")
    if transposable.ORTOOLS.exists():
        tiles = transposable.normal_tiles(8, 20)
        equal = (transposable.ortools(tiles, 4)[0] == transposable.native("exact")(tiles, 4)).all()
        print(f"ortools: {'the same' if equal else 'OTHER'} masks of 4:8 in both directions")
    else:
        print("ortools: not installed (make bench-peers)")
