"""What deploy/ holds is what the tools read, and the commands in it are commands of this program."""

import json
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from rlhf.options import parse

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"


def test_the_cluster_file_follows_rays_schema():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text()))


def test_the_rayjob_asks_for_as_many_gpus_as_its_command_uses():
    job = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())["spec"]
    words = shlex.split(job["entrypoint"])
    assert words[0] == "megaray"
    config = parse(words[1:2] + words[4:])  # without --config FILE, which lies in the image
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert group["replicas"] == config.nnodes
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == config.nproc_per_node
    assert f'"{ray.__version__}"' in (DEPLOY / "rayjob.yaml").read_text()


@pytest.mark.parametrize("script", ["submit.sh", "slurm.sh"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", DEPLOY / script], check=True)
