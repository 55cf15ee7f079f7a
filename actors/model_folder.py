"""The model's folder as this node sees it."""

from __future__ import annotations

from pathlib import Path


def require_model(folder: str) -> None:
    """ValueError naming this node when it does not see the model's folder."""
    if not Path(folder, "config.json").exists():
        import ray

        raise ValueError(
            f"node {ray.util.get_node_ip_address()} does not see the model {folder}: put it on a file system that every node "
            "sees, under the same path"
        )
