"""One fault of `make faults`: a run that is asked to stop at a random moment goes on bit for bit."""

from ci.faults import kills


def test_a_run_that_is_stopped_at_a_random_moment_goes_on_bit_for_bit(capsys):
    assert kills.main(["--trials", "1", "--only", "Data2vec", "--kind", "USR1"]) == 0, capsys.readouterr()
    assert capsys.readouterr().out.splitlines()[-1].split() == ["Data2vec_for_PyTorch", "USR1", "1", "1"]
