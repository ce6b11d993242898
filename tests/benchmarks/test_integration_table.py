"""benchmarks/integration_table.py, and that README shows what it makes of the results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import integration_table

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("\n## Integrations\n")[1].split("\n## ")[0]
KEPT = json.loads(integration_table.RESULTS.read_text())


def test_readme_shows_the_table():
    """If it does not, paste there what `python -m benchmarks.integration_table` prints."""
    command = [sys.executable, "-m", "benchmarks.integration_table"]
    made = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, cwd=ROOT).stdout
    assert [line for line in SECTION.splitlines() if line.startswith("|")] == made.splitlines()


def test_readme_says_what_they_were_made_with():
    said = " ".join(SECTION.split())
    assert f"with Python {KEPT['python']} and torch {KEPT['torch']}," in said


def test_every_module_has_a_row_and_results():
    modules = {path.stem for path in (ROOT / "tests" / "integration").glob("test_*.py")}
    assert modules == set(integration_table.ROWS) == set(KEPT["tests"])


def test_the_extra_pins_what_was_run():
    extra = (ROOT / "pyproject.toml").read_text().split("\nintegration = [\n")[1].split("\n]\n")[0]
    for module, (_, distribution, _) in integration_table.ROWS.items():
        assert distribution == "torch" or f'"{distribution}=={KEPT["versions"][module]}",' in extra


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.integration.test_lightning" name="a" />
<testcase classname="tests.integration.test_lightning" name="b[x.y]"><properties /></testcase>
<testcase classname="tests.integration.test_lightning" name="c"><failure message="x" /></testcase>
<testcase classname="tests.integration.test_timm" name="a"><skipped message="x" /></testcase>
<testcase classname="tests.integration.test_timm" name="b"><error message="x" /></testcase>
<testcase classname="" name="tests.integration.test_fastai"><skipped message="fastai is not installed" /></testcase>
<testcase classname="tests.test_other" name="a" />
</testsuite></testsuites>"""


def test_results_of_junit(tmp_path, monkeypatch):
    (tmp_path / "junit.xml").write_text(JUNIT)
    monkeypatch.setattr(integration_table, "installed", lambda name: None if name == "fastai" else f"1 of {name}")
    found = integration_table.results(tmp_path / "junit.xml")
    assert found["tests"]["test_lightning"] == {"passed": 2, "failed": 1}
    assert found["tests"]["test_timm"] == {"skipped": 1, "failed": 1}
    assert found["tests"]["test_fastai"] == {"skipped": 1}
    assert found["tests"]["test_opacus"] == {}
    lines = integration_table.table(found).splitlines()
    assert lines[2].startswith("| Lightning | 1 of lightning | clipping")
    assert lines[2].endswith(" | 2 passed, 1 failed |")
    assert any(line.endswith(" | 1 failed, 1 skipped |") and line.startswith("| timm |") for line in lines)
    assert any(line.startswith("| fastai | not installed |") and line.endswith(" | 1 skipped |") for line in lines)
    assert any(line.startswith("| opacus |") and line.endswith(" | none |") for line in lines)


@pytest.mark.parametrize("module", integration_table.ROWS)
def test_what_was_run_passed(module):
    """README says that it works."""
    assert KEPT["tests"][module].get("passed")
    assert not KEPT["tests"][module].get("failed")
