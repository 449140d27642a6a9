"""How stored outputs are compared: one unit of a number's last digit is let pass, nothing else."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from nbformat.v4 import new_output
from nbval_plugin import agree, settled


@pytest.mark.parametrize(
    ("new", "stored"),
    [
        ("10.615", "10.614"),
        ("10.613", "10.614"),
        ("1.000", ".999"),
        ("1.000", "0.999"),
        ("-0.29", "-0.30"),
        ("+2.2 for harmful", "+2.1 for harmful"),
        ("96.1% held-out, best 0.99;", "96.0% held-out, best 0.98;"),
        ("DROConfig(weight=1.1, norm=0.001)", "DROConfig(weight=1.0, norm=0.002)"),
        ("[0.1, 0.5)", "[0.0, 0.4)"),
        ("1.24e-05", "1.23e-05"),
        ("1.00e-04", "9.99e-05"),
        ("1e+16", "2e+16"),
    ],
)
def test_one_unit_of_the_last_digit_passes(new, stored):
    assert agree(new, stored) and agree(stored, new)
    assert agree(f"<td>{new}</td>", f"<td>{stored}</td>", markup=True)


@pytest.mark.parametrize(
    ("new", "stored"),
    [
        ("10.616", "10.614"),  # two units
        ("11.614", "10.614"),  # another digit than the last
        ("10.61", "10.614"),  # another count of decimals
        ("10.6140", "10.614"),
        ("-0.1", "0.1"),  # the sign
        ("-0.0", "0.0"),
        ("+2.1", "2.1"),
        ("20", "19"),  # a count
        ("(128,)", "(129,)"),
        ("56%", "57%"),
        ("1,234", "1,235"),
        ("below 1e-4", "below 2e-4"),  # a bound that somebody typed
        ("above 1.5e-4", "above 1.6e-4"),
        ("1.23e-04", "1.23e-05"),
        ("1.23e-05", "1.23"),
        ("2.0e-05", "2e-05"),
        ("mistral-instruct-v0.1", "mistral-instruct-v0.2"),  # names
        ("openchat-3.5-1210", "openchat-3.6-1210"),
        ("orca-2.1", "orca-2.2"),
        ("3.5-1210", "3.6-1210"),
        ("0.5s", "0.6s"),
        ("1.2.3", "1.3.3"),
        ("1.2.3", "1.2.4"),
        ("a0.1", "a0.2"),
        ("nan", "0.1"),
        ("0.1 0.1", "0.1"),
        ("0.1\n", "0.1"),
    ],
)
def test_anything_else_fails(new, stored):
    assert not agree(new, stored) and not agree(stored, new)
    assert not agree(f"<td>{new}</td>", f"<td>{stored}</td>", markup=True)


ROWS = pd.DataFrame({"rate": [9.999, 0.25], "error": [0.125, 7.5], "n": [19, 200]})
ROWS["note"] = ["none", "short"]
MORE = ROWS.assign(rate=[10.0, 0.25])


def text(frame: pd.DataFrame) -> str:
    return frame.to_string(float_format="%.3f")


def html(frame: pd.DataFrame) -> str:
    return frame.to_html(float_format="%.3f")


WRONG = {
    "two units": ROWS.assign(error=[0.127, 7.5]),
    "a count": ROWS.assign(n=[20, 200]),
    "a sign": ROWS.assign(error=[-0.125, 7.5]),
    "a word": ROWS.assign(note=["some", "short"]),
    "a lost row": ROWS[:1],
    "a row more": pd.concat([ROWS, ROWS[:1]]),
    "another order": ROWS[::-1],
    "a lost column": ROWS.drop(columns="error"),
    "another name": ROWS.rename(columns={"error": "fault"}),
    "a lost number": ROWS.assign(error=[None, 7.5]),
}


@pytest.mark.parametrize("show", [text, html])
def test_a_table_may_round_otherwise(show):
    markup = show is html
    assert agree(show(ROWS.assign(error=[0.126, 7.499])), show(ROWS), markup)
    assert len(text(MORE)) > len(text(ROWS))
    assert agree(show(MORE), show(ROWS), markup) and agree(show(ROWS), show(MORE), markup)


@pytest.mark.parametrize("show", [text, html])
@pytest.mark.parametrize("wrong", WRONG)
def test_another_table_fails(show, wrong):
    markup = show is html
    assert not agree(show(WRONG[wrong]), show(ROWS), markup)
    assert not agree(show(WRONG[wrong]), show(MORE), markup)  # nor does a carry hide it


@pytest.mark.parametrize(
    ("new", "stored"),
    [
        ("a  9.999", "a 9.999"),  # nothing was carried
        ("10.000   a", "9.999 a"),  # two spaces
        ("10.000 a b", "9.999 ab"),
        ("10.000\na b", "9.999 a\nb"),
        ("10.000\n\na", "9.999\na"),
        ("10.000\ta", "9.999 a"),
    ],
)
def test_a_carry_shifts_by_one_space_and_moves_no_line(new, stored):
    assert not agree(new, stored) and not agree(stored, new)


def test_the_carry_of_an_array_may_close_its_bracket():
    assert agree("[[10.000  1.5]]", "[[ 9.999  1.5]]")


@pytest.mark.parametrize(
    ("new", "stored"),
    [
        ("<td width='0.5'>1</td>", "<td width='0.6'>1</td>"),
        ('<td title="a > 0.5">1</td>', '<td title="a > 0.6">1</td>'),
        ("<th>0.5</th>", "<td>0.5</td>"),
        ("<style>td {opacity: 0.5}</style>", "<style>td {opacity: 0.6}</style>"),
        ("<script>\nlet x = 0.5</script>", "<script>\nlet x = 0.6</script>"),
        ("<!-- <b> 0.5 -->", "<!-- <b> 0.6 -->"),
        ("<b>10.000</b>  <i>a</i>", "<b>9.999</b> <i>a</i>"),
        ("<td>0.5</td>", "<td>0.5</td><td>0.5</td>"),
    ],
)
def test_markup_must_be_equal(new, stored):
    assert not agree(new, stored, markup=True)


@pytest.mark.parametrize(
    "caption",
    [
        "<figure><img src='a.png'><figcaption>rank correlation 0.{}3</figcaption></figure>",
        "<svg viewBox='0 0 1.5 2'><text x='0.5'>rank correlation 0.{}3</text></svg>",
        "![rank correlation 0.{}3](a.png)",
    ],
)
def test_a_caption_may_round_otherwise(caption):
    stored = caption.format(9)
    assert agree(stored.replace("0.93", "0.92"), stored, markup=True)
    assert not agree(stored.replace("0.93", "0.91"), stored, markup=True)


MOVES = st.lists(st.tuples(st.integers(0, 10**7), st.integers(-3, 3)), min_size=1)


@given(MOVES, st.integers(1, 4))
def test_a_table_agrees_where_no_number_moved_by_more_than_a_unit(moves, decimals):
    assume(all(n + move >= 0 for n, move in moves))
    frames = [
        pd.DataFrame({"name": "row", "value": [n / 10**decimals for n in values]})
        for values in ([n + move for n, move in moves], [n for n, _ in moves])
    ]
    shown = [frame.to_string(float_format=f"%.{decimals}f") for frame in frames]
    assert agree(*shown) == all(abs(move) <= 1 for _, move in moves)
    shown = [frame.to_html(float_format=f"%.{decimals}f") for frame in frames]
    assert agree(*shown, markup=True) == all(abs(move) <= 1 for _, move in moves)


SAME = ["a", "7", "v1.5", "0.1", "\n", "<b title='0.5'>", "</b>"]
CLOSE = [("0.1", "0.2"), ("10.0", "9.9"), ("-0.5", "-0.6"), ("(1.24e-05,", "(1.23e-05,")]
FAR = [("0.1", "0.3"), ("7", "8"), ("a", "b"), ("0.5", "-0.5"), ("0.50", "0.5"), ("v1.5", "v1.6")]
FAR += [("0.1", "a"), ("\n", ""), ("<b>", "<i>"), ("0.1", ""), ("1e-05", "1e-06")]
FINE = st.sampled_from([*zip(SAME, SAME), *CLOSE])


@given(st.lists(FINE), st.lists(st.sampled_from(FAR), max_size=1), st.lists(FINE), st.booleans())
def test_one_far_pair_among_many_fails(before, far, after, markup):
    new, stored = (" ".join(words) for words in zip(("", ""), *before, *far, *after))
    assert agree(new, stored, markup) == agree(stored, new, markup) == (not far)


@given(st.text(), st.booleans())
def test_every_text_agrees_with_itself(text, markup):
    assert agree(text, text, markup)


@given(st.lists(st.text("0123456789.ab -", min_size=1), min_size=1, unique=True), st.data())
def test_a_lost_line_fails(lines, data):
    at = data.draw(st.integers(0, len(lines) - 1))
    assert not agree("\n".join(lines[:at] + lines[at + 1 :]) + "\n", "\n".join(lines) + "\n")


def outputs(rate: str, error: str, seen: str) -> list:
    data = {"text/plain": f"rate {rate}", "text/html": f"<td>{error}</td>", "image/png": seen}
    return [
        new_output("stream", name="stdout", text=f"rate {rate}\n"),
        new_output("execute_result", data=data, execution_count=1),
        new_output("display_data", data={"text/html": f"<td>{error}</td>"}),
    ]


def test_outputs_that_agree_are_settled():
    stored = outputs("10.614", "0.999", "same")
    assert settled(outputs("10.615", "1.000", "same"), stored) == stored


def test_outputs_that_differ_are_left_to_fail():
    stored = outputs("10.614", "0.999", "same")
    for wrong in (
        ("10.616", "0.999", "same"),
        ("10.614", "1.001", "same"),
        ("10.614", "0.999", "other"),
    ):
        assert settled(outputs(*wrong), stored) == outputs(*wrong) != stored
    mixed = settled(outputs("10.615", "1.001", "same"), stored)
    assert mixed[0] == stored[0] and mixed[2].data["text/html"] == "<td>1.001</td>"
    assert settled(stored[:2], stored) == stored[:2]
    wide, wider = (outputs("1.5", f"<b x={width}>", "same") for width in ("0.1", "0.2"))
    assert settled(wide, wider) == wide
    more = outputs("10.615", "0.999", "same")
    assert settled(more, stored[:1]) == [stored[0], *more[1:]]
    errors = [new_output("stream", name="stderr", text="rate 10.615\n")]
    assert settled(errors, stored) == errors
    assert settled([stored[0]], [stored[1]]) == [stored[0]]
