"""docs/rows.md names the tests there are, and every row has one."""

import textwrap

import rows


def write(folder, name, source):
    (folder / name).write_text(textwrap.dedent(source), encoding="utf-8")


def test_every_row_has_a_test_and_the_page_is_fresh():
    page = rows.TABLE.read_text(encoding="utf-8") if rows.TABLE.exists() else ""
    found = rows.problems(rows.marked_tests(), page)
    assert not found, "\n".join([*found, "run: python scripts/rows.py"])


def test_marks_are_found_on_functions_classes_modules_and_parameters(tmp_path):
    write(
        tmp_path,
        "test_one.py",
        """
        import pytest

        pytestmark = [pytest.mark.rows("T1")]

        @pytest.mark.rows("T2", "T3")
        def test_a(): ...

        @pytest.mark.rows("F1")
        class TestB:
            @pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.rows("F2"))])
            def test_c(self, x): ...

        ROWS = {"x": "G1", "y": "G2"}

        @pytest.mark.parametrize("x", [pytest.param(x, marks=pytest.mark.rows(ROWS[x])) for x in ROWS])
        def test_d(x): ...

        def not_a_test(): ...
        """,
    )
    a, c, d = "test_one.py::test_a", "test_one.py::TestB::test_c", "test_one.py::test_d"
    assert rows.marked_tests(tmp_path, tmp_path) == {
        "T1": {a, c, d}, "T2": {a}, "T3": {a}, "F1": {c}, "F2": {c}, "G1": {d}, "G2": {d},
    }  # fmt: skip


def test_page_says_the_result_and_reads_back():
    marked = {row: {f"tests/test_{row}.py::test_it"} for row in rows.ROWS | rows.BEGUN}
    marked["T1"].add("tests/test_more.py::test_that")
    outcomes = {
        "tests/test_T1.py::test_it": {"passed": 3, "failed": 1},
        "tests/test_more.py::test_that": {"skipped": 1},
    }
    page = rows.render(marked, outcomes)
    line = next(line for line in page.splitlines() if line.startswith("| T1 |"))
    assert line.endswith("| 1 failed, 3 passed, 1 skipped |")
    assert rows.written_tests(page) == marked
    assert rows.problems(marked, page) == []


def test_missing_tests_unknown_rows_and_stale_names_are_reported():
    marked = {row: {f"tests/test_{row}.py::test_it"} for row in rows.ROWS | rows.BEGUN}
    page = rows.render(marked, {})
    del marked["T1"]
    marked["T2"] = {"tests/test_T2.py::test_renamed"}
    marked["ZZ9"] = {"tests/test_z.py::test_z"}
    assert rows.problems(marked, page) == [
        f"row T1 ({rows.ROWS['T1']}) has no test",
        "row ZZ9 has no title in scripts/rows.py",
        "row T1: tests/test_T1.py::test_it is in docs/rows.md but not marked",
        "row T2: tests/test_T2.py::test_renamed is not in docs/rows.md",
        "row T2: tests/test_T2.py::test_it is in docs/rows.md but not marked",
    ]


def test_recorder_counts_every_parameter_and_a_failed_set_up(pytester):
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.mark.parametrize("x", [1, 2, 3])
        def test_x(x):
            assert x != 2

        @pytest.fixture
        def broken():
            raise RuntimeError("no")

        def test_y(broken): ...

        @pytest.mark.skip
        def test_z(): ...
        """
    )
    recorder = rows.Recorder()
    pytester.inline_run("-p", "no:cacheprovider", plugins=[recorder])
    assert recorder.outcomes == {
        "test_it.py::test_x": {"passed": 2, "failed": 1},
        "test_it.py::test_y": {"failed": 1},
        "test_it.py::test_z": {"skipped": 1},
    }
