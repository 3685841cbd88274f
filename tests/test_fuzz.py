"A short form of `python tests/fuzz.py`"
import pytest
from fuzz import KINDS, attempt


@pytest.mark.parametrize('kind', KINDS)
def test_changed_files_are_read_or_refused_in_a_sentence(kind, tmp_path):
    counts, faults = attempt(kind, 60, tmp_path)
    assert not faults, next(iter(faults.items()))
    assert counts['refused'] > 0
