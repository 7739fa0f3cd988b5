"""Checks what launch/ renders against the original schemas. Run it by hand, in an environment of its own:

    pip install skypilot==0.14.1 jsonschema pyyaml
    git clone https://github.com/kubernetes-sigs/jobset
    python tests/launch/check_in_full.py jobset/config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml

Fields that are not in the definition are errors here, as they are for `kubectl create`.
"""

import os
import pathlib
import subprocess
import sys

import jsonschema
import yaml

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


def forbid_unknown(schema) -> None:
    """Makes objects of a Kubernetes schema refuse unknown fields, in place."""
    if isinstance(schema, dict):
        if schema.pop("x-kubernetes-int-or-string", False):
            schema.pop("anyOf", None)
            schema["type"] = ["integer", "string"]
        if "properties" in schema and schema.get("type") == "object":
            schema.setdefault("additionalProperties", False)
    for child in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        forbid_unknown(child)


def check_jobset(definition: pathlib.Path) -> None:
    """Validates what launch/gke_jobset.sh renders.

    Raises:
      jsonschema.ValidationError: It is not a valid JobSet.
    """
    versions = {v["name"]: v for v in yaml.safe_load(definition.read_text())["spec"]["versions"]}
    schema = versions["v1alpha2"]["schema"]["openAPIV3Schema"]
    forbid_unknown(schema)
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own fields, which the definition leaves out
    command = ["bash", LAUNCH / "gke_jobset.sh", "--dry_run", "mc3_jax.train", "--config=configs/mc3_ego4d.py"]
    done = subprocess.run(command, env=os.environ | {"IMAGE": "i", "CLAIM": "c"}, capture_output=True, check=True)
    jsonschema.validate(yaml.safe_load(done.stdout), schema)


def check_skypilot() -> None:
    """Lets SkyPilot read launch/skypilot.yaml.

    Raises:
      ValueError: It is not a valid task.
    """
    import sky
    from sky.utils import common_utils, schemas

    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    common_utils.validate_schema(task, schemas.get_task_schema(), "task: ")
    common_utils.validate_schema(task["resources"], schemas.get_resources_schema(), "resources: ")
    envs = {"COMMAND": "mc3_jax.train", "BUCKET": "gs://mine"}
    print(sky.Task.from_yaml_config(task, env_overrides=list(envs.items())))


if __name__ == "__main__":
    check_jobset(pathlib.Path(sys.argv[1]))
    check_skypilot()
    print("both are what they shall be")
