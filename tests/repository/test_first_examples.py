"""The first script that a stranger copies, for each framework: it runs, learns, and averages."""

import re
from pathlib import Path

import pytest

from tests.support.launching import launched

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "first"
# an operator for inference only, which DeepSpeed would compile first, and whose lock outlives a killed process
WITHOUT_COMPILING = 'import deepspeed\n\ndeepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False\n'


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py")))
def test_a_first_script_runs(tmp_path, script):
    text = (FOLDER / script).read_text()
    assert len(text.splitlines()) <= 40
    (tmp_path / script).write_text(WITHOUT_COMPILING * ("deepspeed" in script) + text)
    said, _ = launched([tmp_path / script, tmp_path], 2, tmp_path, DS_ACCELERATOR="cpu", ACCELERATE_USE_CPU="true")
    loss, sent = re.search(r"loss (\d\.\d+), ([\d,]+) bytes", said).groups()
    begin = 4.2 if "trainer" in script else 2.0  # of guessing
    assert float(loss) < begin / 2 and int(sent.replace(",", "")) > 0
