"""The fast part of `make faults`: a stop at a random moment, a full disk, a thousand damaged and hostile files."""

from ci.faults import __main__ as faults
from ci.faults import fuzz
from ci.faults.soak import Sample, growth

CASES = 40  # of each parser: a thousand in all


def test_a_run_that_is_stopped_or_fills_its_disk_goes_on_bit_for_bit(capsys):
    assert faults.main(["--trials", "1", "--only", "Data2vec", "--kind", "USR1", "full disk"]) == 0, capsys.readouterr()
    stopped, full = capsys.readouterr().out.splitlines()[-2:]
    assert stopped.split() == ["Data2vec_for_PyTorch", "USR1", "1", "1"]
    assert full.split()[-2:] == ["1", "1"] or "skipped: no tmpfs may be mounted" in full


def test_parsers_read_or_refuse_by_name():
    found = {parser.name: fuzz.fuzz(parser, CASES) for parser in fuzz.parsers()}
    assert len(found) > 20 and not any(found.values()), found


def test_a_parser_that_raises_what_is_not_ours_or_takes_a_numbers_word_for_memory_is_found(tmp_path):
    careless = fuzz.Parser(
        "careless", "n.txt", b"8", lambda path: bytearray(int(path.read_bytes())), (ValueError,), False
    )
    with fuzz.limited_memory():
        assert "MemoryError" in fuzz.problem_of(careless, tmp_path, b"9" * 11)
        assert fuzz.problem_of(careless, tmp_path, b"x") is None
    nameless = fuzz.Parser("nameless", "n.txt", b"8", careless.read, (ValueError,))
    assert "without the file" in fuzz.problem_of(nameless, tmp_path, b"x")


def test_what_grows_in_a_soak_is_named():
    steady = [Sample(i, 500.0 + i % 3, 40, 9) for i in range(30)]
    assert growth(steady) == []
    leak = [Sample(i, 500.0 + 8 * i, 40 + i, 9) for i in range(30)]
    assert [text.split()[0] for text in growth(leak)] == ["memory_mib", "files"]
