"""One of two processes that train a network together; ``test_parallel`` starts both."""

from __future__ import annotations

import sys
from pathlib import Path


def main(rank: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from test_parallel import call_of, loss_of
    from torch.nn.parallel import DistributedDataParallel

    import backdrift as bd
    from tiny_pipelines import tiny_sd

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    pipe = tiny_sd()
    network = pipe.unet
    pipe.unet = DistributedDataParallel(network)
    steps = []
    for step in range(2):  # the second pass has its buckets rebuilt
        network.zero_grad()
        with bd.differentiable(pipe, "min", train="unet", clamp=True):
            loss_of(pipe(**call_of(pipe, seed=10 * step + rank)).images).backward()
        steps.append([p.grad.clone() for p in network.parameters()])
    torch.save(steps, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(int(sys.argv[1]), Path(sys.argv[2]))
