"""The browser of the tests sees what it must: a tab that hears nothing would let every page pass."""

import pytest

from tests.support.browser import Tab, page_of
from tests.support.stack import Stack
from tests.support.waiting import until

POLICY = "default-src 'self'"


@pytest.mark.parametrize(
    ("html", "policy", "heard"),
    [
        ("<script>console.error('lost')</script>", "", "console error: lost"),
        ("<script>console.warn('lost')</script>", "", "console warning: lost"),
        ("<script>nothing.there</script>", "", "uncaught: nothing is not defined"),
        ("<script>1</script>", POLICY, "policy: script-src-elem refuses inline"),
        ("<p style='color: red'>", POLICY, "policy: style-src-attr refuses inline"),
        ("<img src='http://elsewhere.example/x.png'>", "", "foreign request: http://elsewhere.example/x.png"),
        ("<img src='http://elsewhere.example/x.png'>", POLICY, "policy: img-src refuses http://elsewhere.example"),
    ],
)
def test_what_is_wrong_with_a_page_is_heard(html: str, policy: str, heard: str, tab: Tab) -> None:
    with page_of(html, policy) as url:
        assert tab.open(url) == 200
        until(lambda: any(problem.startswith(heard) for problem in tab.problems()))  # a breach is told a moment later
    tab.expect("")
    assert tab.problems() == []


def test_a_page_that_is_well_has_no_problems(tab: Tab, stack: Stack) -> None:
    with page_of("<title>well</title>", POLICY) as url:
        tab.open(url)
        assert stack.sql("SELECT 1 AS one") == [{"one": 1}]  # no event loop runs between two calls
        assert tab.do(tab.page.title()) == "well"
