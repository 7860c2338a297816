"""Training on a Ray cluster: `python examples/ray_cluster.py WORKERS --config run.yaml --run_dir /shared/run`.

Every actor is one process of the run, as torchrun would start it; the run folder must be on a disk that all
of them see. An actor that fails ends the run, which goes on from its newest checkpoint when it is started again.
"""

import os
import socket
import sys

import ray


@ray.remote(num_cpus=1, num_gpus=1 if os.environ.get("CUDA_VISIBLE_DEVICES") else 0)
class Worker:
    def address(self) -> tuple[str, int]:
        """Of a free port on this actor's node."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def train(self, rank: int, world: int, address: tuple[str, int], words: list[str]) -> int:
        host, port = address
        os.environ |= {
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
        }
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # Ray shows an actor its own GPU alone
        from react_fast.cli import main

        return main(["train", "--resume", "auto", *words])


if __name__ == "__main__":
    world, words = int(sys.argv[1]), sys.argv[2:]
    ray.init()
    workers = [Worker.remote() for _ in range(world)]
    address = ray.get(workers[0].address.remote())
    codes = ray.get([worker.train.remote(rank, world, address, words) for rank, worker in enumerate(workers)])
    sys.exit(max(codes))
