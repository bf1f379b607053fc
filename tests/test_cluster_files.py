"""The templates that users copy to run a cohort on a cluster."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

PACKAGING = Path(__file__).parents[1] / "packaging"
SBATCH = PACKAGING / "slurm" / "complete.sbatch"


def told(tmp_path, *command, **settings):
    """What a script hands to crossmr."""
    program = tmp_path / "crossmr"
    program.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS" "$@"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **settings}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=20).stdout


@pytest.mark.parametrize(
    ("settings", "part"),
    [({"SLURM_ARRAY_TASK_MAX": "100"}, "7/100"), ({"SLURM_ARRAY_TASK_MAX": "12", "PARTS": "100"}, "7/100")],
)
def test_a_task_of_a_slurm_array_completes_its_part(tmp_path, settings, part):
    settings |= {"SLURM_ARRAY_TASK_ID": "7", "SLURM_CPUS_PER_TASK": "4"}
    said = told(tmp_path, "bash", str(SBATCH), **settings)
    assert said == f"4 complete /path/to/cohort -o /path/to/completed --part {part}\n"


def test_slurm_reads_every_line_that_is_meant_for_it():
    """It reads no further than the first command."""
    lines = SBATCH.read_text().splitlines()
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert all(number < commands[0] for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    (array,) = (number for number, line in enumerate(lines) if line == "#SBATCH --array=1-100")
    assert commands[:2] == [array + 1, array + 2]  # the three lines to change are one below the other
    assert "--requeue" in SBATCH.read_text()


def test_a_pod_of_an_indexed_job_completes_its_part(tmp_path):
    job = yaml.safe_load((PACKAGING / "kubernetes" / "job.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = {one["name"]: one["value"] for one in container["env"]}
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert settings["PARTS"] == str(spec["completions"])
    for index, part in (("0", "1/100"), ("99", "100/100")):
        command = (*container["command"], *container["args"])
        said = told(tmp_path, *command, JOB_COMPLETION_INDEX=index, **settings)
        assert said == f"4 complete /cohort -o /out --part {part}\n"
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]


def test_a_rule_of_snakemake_completes_its_part():
    text = (PACKAGING / "snakemake" / "Snakefile").read_text()
    assert [line.partition(" =")[0] for line in text.splitlines()[1:4]] == ["COHORT", "OUT", "PARTS"]
    command = re.search(r'shell:\n\s+"(.*)"', text)[1]
    assert "crossmr complete {COHORT:q} -o {OUT:q} --part {wildcards.part}/{PARTS}" in command
    assert "range(1, PARTS + 1)" in text
