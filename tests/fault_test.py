"""A real run is killed again and again, and ends in the same bits.

The command itself on a tiny model: SIGKILL and SIGTERM at random moments, of which
some are aimed at saves and starts. Slow: every start is a process, and 20 kills take
two minutes: `pytest -m slow tests/fault_test.py`. FAULT_KILLS says how many kills
(default 20; `.ci/run` has fewer), FAULT_SEED at which moments.
`benchmarks/faults.py` runs the same with hundreds, and with several processes.
"""

import os
import re

import pytest
import tiny_run
from kills import EVERY, MOMENTS, Campaign

KILLS = int(os.environ.get("FAULT_KILLS", 20))
SEED = int(os.environ.get("FAULT_SEED", 0))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    folder = tiny_run.write(tmp_path_factory.mktemp("tiny"))
    campaign = Campaign(folder, KILLS, SEED)
    campaign.run_uninterrupted()
    campaign.run_killed()
    return campaign


def test_however_it_was_killed_the_run_ends_in_the_same_bits(campaign):
    a, b = (
        tiny_run.saved(workdir, campaign.steps)
        for workdir in (campaign.workdir, campaign.uninterrupted)
    )
    tiny_run.assert_same_bits(a, b)
    assert a["['step']"] == campaign.steps


def test_every_step_is_in_the_metrics_once_and_as_it_was(campaign):
    rows = tiny_run.rows(campaign.workdir)
    assert rows == tiny_run.rows(campaign.uninterrupted)
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, campaign.steps + 1))


def test_a_kill_loses_at_most_the_steps_since_the_last_checkpoint(campaign):
    for kill in campaign.kills:
        assert kill["is_fine"], kill
        # One may be on its way to the disk, and a step or two to the log.
        assert kill["steps_lost"] <= 2 * EVERY + 2, kill
        if kill["signal"] == "SIGTERM" and kill["aimed_at"] != "start":
            assert kill["steps_lost"] == 0, kill
    said = (campaign.workdir.parent / "killed.log").read_text(errors="replace")
    starts = {int(step) for step in re.findall(r"going on from step (\d+) of", said)}
    assert starts <= {kill["newest_checkpoint"] for kill in campaign.kills}
    assert "damaged" not in said


def test_the_kills_met_what_they_were_aimed_at(campaign):
    assert len(campaign.kills) == KILLS
    assert len({kill["signal"] for kill in campaign.kills}) == 2
    if KILLS >= 20:
        assert {kill["aimed_at"] for kill in campaign.kills} == {*MOMENTS}
        assert sum(kill["half_written"] for kill in campaign.kills) >= 2
    left = [p.name for p in (campaign.workdir / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in left), left
