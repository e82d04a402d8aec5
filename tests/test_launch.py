"""What starts a run on a cluster: the scripts do what they say, with stand-ins for the commands of Slurm and of Google's
cloud, and the Kubernetes file fits the published schemas."""

import os
import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
CHOICES = {  # the schemas leave these open
    "completionMode": {"Indexed", "NonIndexed"},
    "restartPolicy": {"OnFailure", "Never"},
}


def stand_in(folder: Path, name: str, script: str) -> None:
    """An executable that takes the place of a command."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{script}\n")
    file.chmod(0o755)


def run(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": path} | environment, capture_output=True, text=True, timeout=60
    )


def checkout(folder: Path, requirement: str) -> None:
    """The launch folder with an environment that is there already, whose g4v repeats its arguments."""
    (folder / "launch").mkdir()
    for file in ("environment.sh", "slurm.sbatch", "tpu_vm.sh"):
        (folder / "launch" / file).write_text((LAUNCH / file).read_text())
    (folder / "setup.py").write_text("")
    (folder / ".venv").mkdir()
    stand_in(folder / ".venv/bin", "pip", "exit 1")  # nothing is installed
    stand_in(folder / ".venv/bin", "g4v", 'printf "g4v"; printf " <%s>" "$@"; echo; exit ${STATUS:-0}')
    sums = subprocess.run("cksum < setup.py", shell=True, cwd=folder, capture_output=True, text=True).stdout.strip()
    (folder / ".venv/installed").write_text(f"{requirement} {sums}\n")


@pytest.mark.parametrize("status", [0, 2, 143])
def test_slurm_starts_every_task_and_passes_its_status_on(status, tmp_path):
    checkout(tmp_path, ".")
    stand_in(tmp_path / "bin", "srun", 'printf "%s\\n" "$1"; shift; exec "$@"')
    done = run(
        "bash", "launch/slurm.sbatch", "--config=a b.py", "--workdir=w",
        folder=tmp_path, SLURM_SUBMIT_DIR=str(tmp_path), STATUS=str(status),
    )  # fmt: skip
    assert done.stdout == "--kill-on-bad-exit=1\ng4v <train> <--coordinator=auto> <--config=a b.py> <--workdir=w>\n"
    assert done.returncode == status
    assert ("submit the same command" in done.stderr) == (status == 143)


def test_slurm_is_told_before_its_time_limit():
    options = re.findall(r"^#SBATCH --(\S+?)(?:=(\S+))?$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    assert dict(options)["signal"] == "TERM@120"


def test_a_tpu_slice_gets_this_commit_and_the_arguments_on_every_host(tmp_path):
    checkout(tmp_path, ".[tpu]")
    for command in ("init -q", "add launch setup.py", "-c user.name=a -c user.email=a@b commit -qm a"):
        subprocess.run(f"git {command}", shell=True, cwd=tmp_path, check=True)
    host = tmp_path / "host"
    host.mkdir()
    # a host of the slice: what is copied lies in its home, what is run there runs for each worker
    stand_in(
        tmp_path / "bin", "gcloud",
        f'echo "$*" | head -1; case "$4" in scp) cp "$5" {host}/g4v.tgz;; ssh) mkdir -p {host}/g4v; cp -r .venv {host}/g4v/\n'
        f'for last in "$@"; do :; done; cd {host}; bash -c "${{last#--command=}}";; esac',
    )  # fmt: skip
    done = run("bash", "launch/tpu_vm.sh", "pod", "zone-a", "--config=it's.py", "--workdir=w", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    copied, started, ran = done.stdout.splitlines()
    assert re.fullmatch(r"compute tpus tpu-vm scp \S+ pod:g4v.tgz --zone=zone-a --worker=all", copied)
    assert started.startswith("compute tpus tpu-vm ssh pod --zone=zone-a --worker=all --command=")
    assert ran == "g4v <train> <--coordinator=auto> <--config=it's.py> <--workdir=w>"
    assert (host / "g4v/setup.py").exists()


def test_a_tpu_slice_without_arguments_is_explained():
    done = run("bash", str(LAUNCH / "tpu_vm.sh"), "pod", folder=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("usage:")


def kubernetes() -> tuple[dict, dict]:
    return tuple(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


def values(tree, name: str) -> list:
    """Every value of a field of this name."""
    if isinstance(tree, list):
        return [value for part in tree for value in values(part, name)]
    if not isinstance(tree, dict):
        return []
    return [value for key, part in tree.items() for value in ([part] if key == name else []) + values(part, name)]


def test_kubernetes_file_fits_the_schemas():
    for resource in kubernetes():
        kubernetes_validate.validate(resource, "1.37", strict=True)
        for name, known in CHOICES.items():
            assert set(values(resource, name)) <= known


def test_kubernetes_file_agrees_with_itself():
    service, job = kubernetes()
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    (arguments,) = container["args"]
    name = job["metadata"]["name"]
    host, port = re.search(r"--coordinator=(\S+):(\d+)", arguments).groups()
    assert host == f"{name}-0.{service['metadata']['name']}" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert [{"containerPort": int(port)}] == container["ports"]
    assert spec["completions"] == spec["parallelism"] == int(container["env"][0]["value"])
    assert spec["completionMode"] == "Indexed" and "JOB_COMPLETION_INDEX" in arguments
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    config = re.search(r"--config=(\S+)", arguments)[1]
    assert (ROOT / config).exists()
