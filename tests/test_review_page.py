"""The review page in headless Chromium, as a moderator uses it: keys, blur, hostile names, two people, ten thousand."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import StoreError
from pipeline.listing.source import image_id
from pipeline.plan import Preparation
from pipeline.reporting.visible import visible
from pipeline.review.decisions import read_standing, write_decision
from pipeline.review.desk import Desk
from pipeline.review.log import rows_of
from pipeline.review.picture import Pictures
from pipeline.review.server import ReviewServer
from pipeline.steps.fetch import FetchError
from pipeline.storage import parse_uri
from pipeline.store import Store
from tests.review_pages import appeal_by, desk_of, draw, drawn_row, flagged_row, night, of_file, served, write_run

Open = Callable[..., Any]


class Browser:
    """Tabs on served desks. What a page asks of anybody else, logs as an error or opens as a dialog is kept."""

    def __init__(self, chromium: Any) -> None:
        self.chromium = chromium
        self.contexts: list[Any] = []
        self.serving: list[Any] = []
        self.trouble: list[str] = []
        self.expected: set[str] = set()

    def open(self, desk: Desk, width: int = 1280, height: int = 800, **options: Any) -> Any:
        serving = served(desk)
        server = serving.__enter__()
        self.serving.append(serving)
        return self.visit(server, width, height, **options)

    def visit(self, server: ReviewServer, width: int = 1280, height: int = 800, **options: Any) -> Any:
        context = self.chromium.new_context(viewport={"width": width, "height": height}, **options)
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        own = f"http://127.0.0.1:{server.port}/"
        page.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        page.on("console", lambda line: line.type in ("error", "warning") and self.trouble.append(line.text))
        page.on("dialog", lambda dialog: (self.trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda sent: sent.url.startswith((own, f"blob:{own}")) or self.trouble.append(sent.url))
        page.server = server
        page.goto(server.address)
        return page


@pytest.fixture
def browser(chromium: Any) -> Iterator[Browser]:
    browser = Browser(chromium)
    yield browser
    for context in browser.contexts:
        context.close()
    for serving in browser.serving:
        serving.__exit__(None, None, None)
    assert [line for line in browser.trouble if not any(words in line for words in browser.expected)] == []


def until(page: Any, expression: str, seconds: float = 20.0) -> None:
    """playwright's own waiting evaluates text in the page, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, (expression, page.inner_text("body"))
        page.wait_for_timeout(20)


def ready(page: Any) -> str:
    """Waits for a picture that can be decided on; the name beside it."""
    page.wait_for_selector("#picture:not([hidden])")
    until(page, "document.querySelector('#picture').naturalWidth > 0")
    page.wait_for_timeout(260)  # keys pressed sooner are meant for the picture before
    return page.inner_text("#name")


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def decide(page: Any, *keys: str) -> None:
    """Keys that end in a decision; returns when the page says that it is saved."""
    page.evaluate("document.querySelector('#status').textContent = ''")
    press(page, *keys)
    until(page, "document.querySelector('#status').textContent.startsWith('Saved')")


def is_blurred(page: Any) -> bool:
    return "blur(36px)" in page.eval_on_selector("#picture", "picture => getComputedStyle(picture).filter")


def rows_in(store: Store) -> list[dict[str, Any]]:
    folder = Path(parse_uri(store.uri).key) / "reviews"
    return sorted(pq.read_table(folder).to_pylist(), key=lambda row: row["decided_at"]) if folder.exists() else []


def test_a_night_is_reviewed_by_keys_alone(browser, tmp_path):
    store = night(tmp_path, flagged=3, drawn=1)
    page = browser.open(desk_of(store))
    names = [ready(page)]
    assert page.url == f"http://127.0.0.1:{page.server.port}/"  # the token is not left on the screen
    assert page.inner_text("#count") == "0 of 4" and page.inner_text("#who").startswith("First review · ann")
    decide(page, "Space", "v")
    assert page.inner_text("#status") == "Saved: violating."
    names.append(ready(page))
    assert page.inner_text("#count") == "1 of 4"
    decide(page, "u")
    names.append(ready(page))
    press(page, "z")
    until(page, "document.querySelector('#status').textContent.startsWith('Taken back')")
    assert ready(page) == names[1] and page.inner_text("#count") == "1 of 4"
    decide(page, "Space", "n")
    assert ready(page) == names[2]
    press(page, "s")
    names.append(ready(page))
    decide(page, "Space", "n")
    page.wait_for_selector("#end:not([hidden])")
    assert page.inner_text("#end-title") == "Nothing is left for you at the moment."
    assert "3 of 4 images have a decision. Of the others 1 you left for later." in page.inner_text("#end-text")
    press(page, "r")
    assert ready(page) == names[2]
    decide(page, "Space", "v")
    page.wait_for_selector("#end:not([hidden])")
    assert page.inner_text("#end-title") == "Everything here is decided."
    assert sorted(page.inner_text("#end-list").splitlines()) == ["not violating: 2", "violating: 2"]
    assert len(set(names)) == 4
    by_name = {row["source_uri"]: row["decision"] for row in rows_in(store) if row["decision"] != "unsure"}
    assert [by_name[name] for name in (names[0], names[2], names[3])] == ["violating", "violating", "not violating"]
    assert [row["decision"] for row in rows_in(store)].count("withdrawn") == 1
    assert sorted(read_standing(store).labels.values()) == [0, 0, 1, 1]


def test_every_picture_comes_blurred_and_a_blurred_one_cannot_be_cleared(browser, tmp_path):
    store = night(tmp_path, flagged=3, drawn=0)
    page = browser.open(desk_of(store))
    ready(page)
    assert is_blurred(page) and page.get_attribute("#picture", "alt") == "Picture under review, blurred"
    press(page, "n")
    assert page.inner_text("#status").startswith("Look at it first") and rows_in(store) == []
    press(page, "Space")
    assert not is_blurred(page)
    press(page, "Space")
    assert is_blurred(page)
    press(page, "Space", "g")
    assert page.eval_on_selector("#picture", "picture => getComputedStyle(picture).filter") == "grayscale(1)"
    decide(page, "n")
    ready(page)
    assert is_blurred(page) and "grayscale(1)" in page.eval_on_selector(
        "#picture", "picture => getComputedStyle(picture).filter"
    )
    page.reload()
    ready(page)
    assert is_blurred(page) and page.get_attribute("#grey", "aria-pressed") == "true"
    decide(page, "v")
    assert [row["revealed"] for row in rows_in(store)] == [True, False]


def test_one_key_never_decides_two_pictures(browser, tmp_path):
    store = night(tmp_path, flagged=4, drawn=0)
    page = browser.open(desk_of(store))
    ready(page)
    # Held down, and pressed twice in a row.
    page.keyboard.down("v")
    for _ in range(5):
        page.keyboard.down("v")
    page.keyboard.up("v")
    page.keyboard.press("v")
    until(page, "document.querySelector('#count').textContent === '1 of 4'")
    ready(page)
    assert len(rows_in(store)) == 1
    # With a button in focus its own key means the button: Space on "Unsure" does not uncover the picture.
    page.focus("#unsure")
    page.keyboard.press("Space")
    until(page, "document.querySelector('#count').textContent === '2 of 4'")
    assert is_blurred(page) and [row["decision"] for row in rows_in(store)] == ["violating", "unsure"]


def test_with_several_categories_it_is_said_which(browser, tmp_path):
    store = night(tmp_path, flagged=3, drawn=1, categories=("gore", "hate", "weapon"))
    page = browser.open(desk_of(store))
    ready(page)
    press(page, "Space", "v")
    assert page.inner_text("#status").startswith("Say first what it violates")
    press(page, "1", "3")
    press(page, "n")
    assert page.inner_text("#status").startswith("You have chosen what it violates")
    decide(page, "v")
    assert page.inner_text("#status") == "Saved: gore, weapon."
    assert [(row["category"], row["label"]) for row in rows_in(store)] == [("gore", 1), ("hate", 0), ("weapon", 1)]
    ready(page)
    assert page.locator("#choices input:checked").count() == 0
    page.select_option("#category", "hate")
    until(page, "document.querySelector('#count').textContent === '0 of 1'")
    ready(page)
    decide(page, "Space", "2", "v")
    page.wait_for_selector("#end:not([hidden])")
    assert page.inner_text("#end-title") == "Everything here is decided." and page.inner_text("#count") == "1 of 1"


HOSTILE = [
    "<img src=x onerror=alert(1)>.jpg",
    '"><script>alert(1)<\u2044script>.jpg',
    "two\nlines.jpg",
    "exe.\u202egpj",
]


def test_hostile_names_and_files_are_inert(browser, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    about = [of_file(draw(source / name, number)) for number, name in enumerate(HOSTILE)]
    script = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>'
    (source / "a.svg").write_bytes(script)
    about.append(of_file(source / "a.svg"))
    # In a bucket a name is what it is; a folder's is quoted.
    raw = f"s3://b/{HOSTILE[0]}"
    about.append({"image_id": image_id(raw, "1"), "source_uri": raw, "etag": "1", "size_bytes": 5})
    rows = [flagged_row(row, "mon", "gore", 0.9 - place / 10) for place, row in enumerate(about)]
    store = Store(str(tmp_path / "out"))
    write_run(store, "mon", rows, categories=("<b>gore</b>",))
    desk = desk_of(store, reviewer="<i>ann</i>")
    desk.pictures = Pictures(Preparation(fetch_seconds=1), "http://127.0.0.1:9")  # no test asks AWS for anything
    page = browser.open(desk)
    seen = []
    for _ in range(5):
        until(
            page,
            "!document.querySelector('#review').hidden && "
            "(!document.querySelector('#violating').disabled || !document.querySelector('#not-seen').hidden)",
        )
        page.wait_for_timeout(260)
        seen.append(page.inner_text("#name"))
        if page.is_visible("#not-seen"):
            assert "of none of the formats" in page.inner_text("#notice")
            decide(page, "x")
        else:
            decide(page, "Space", "v")
    until(page, "document.querySelector('#name').textContent.startsWith('s3://')")
    seen.append(page.inner_text("#name"))
    assert seen == [visible(row["source_uri"]) for row in about] and seen[5] == raw
    assert page.inner_text("#confirm") == "Violating: <b>gore</b>" and "<i>ann</i>" in page.inner_text("#who")
    page.keyboard.press("h")
    page.wait_for_selector("#history:not([hidden])")
    assert "<i>ann</i>" in page.inner_text("#history")
    assert page.locator("body script, #name *, b, i, svg, iframe").count() == 0
    assert page.evaluate("document.images.length") == 1


def test_a_first_review_shows_no_score_before_the_decision_and_a_second_does(browser, tmp_path):
    store = night(tmp_path, flagged=2, drawn=1)
    page = browser.open(desk_of(store))
    for number in range(3):
        name = ready(page)
        assert page.is_hidden("#history") and "0.9" not in page.inner_text("body")
        decide(page, "Space", "v" if number else "n")
    page.wait_for_selector("#end:not([hidden])")
    assert page.is_enabled("#end-undo")
    press(page, "h")
    until(page, "document.querySelector('#end #history').textContent.includes('First review: violating (gore), ann')")
    assert page.inner_text("#history-name") == name and page.is_disabled("#end-undo")
    press(page, "z")
    assert len(rows_in(store)) == 3 and page.inner_text("#status").startswith("That decision stays")

    second = browser.open(desk_of(store, reviewer="bob", kind="second"))
    ready(second)
    assert second.inner_text("#who").startswith("Second opinion · bob")
    assert "score 0." in second.inner_text("#history") and "ann" not in second.inner_text("#history")
    decide(second, "Space", "v")
    ready(second)
    press(second, "h")
    until(second, "document.querySelector('#history').textContent.includes('ann')")
    assert "First review: not violating, ann" in second.inner_text("#history")
    own = browser.open(desk_of(store, kind="second"))
    own.wait_for_selector("#end:not([hidden])")
    assert "3 more were decided by you before: somebody else has to look." in own.inner_text("#end-text")

    uri = rows_in(store)[0]["source_uri"]
    appeal = browser.open(appeal_by(store, "cat", uri.rsplit("/", 1)[1]))
    assert ready(appeal) == uri and appeal.inner_text("#count") == "0 of 1"
    assert "First review: not violating, ann" in appeal.inner_text("#history")
    decide(appeal, "Space", "u")
    appeal.wait_for_selector("#end:not([hidden])")
    assert "1 that you left unsure stay open: somebody else has to look." in appeal.inner_text("#end-text")
    other = browser.open(appeal_by(store, "dan"))
    assert ready(other) == uri and "Appeal: unsure, cat" in other.inner_text("#history")
    decide(other, "Space", "n")
    other.wait_for_selector("#end:not([hidden])")
    assert "somebody else" not in other.inner_text("#end-text")


def test_history_comes_with_a_whole_name_and_goes_back_to_where_one_was(browser, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    names = ["/".join(letter * 60 for _ in range(9)) + ".jpg" for letter in "abc"]
    for name in names:
        (source / name).parent.mkdir(parents=True)
    about = [of_file(draw(source / name, number)) for number, name in enumerate(names)]
    store = Store(str(tmp_path / "out"))
    write_run(store, "mon", [flagged_row(row, "mon", "gore", 0.9 - place / 10) for place, row in enumerate(about)])
    for number, row in enumerate(about):
        said = {"kind": "first", "reviewer": "ann", "answer": "violating", "violating": ("gore",), "revealed": True}
        image = {"run_id": "mon", "image_id": row["image_id"], "source_uri": row["source_uri"]}
        made = rows_of(decision_id=f"{number:032x}", item_rows=image, categories=("gore",), sha256="0" * 64, **said)
        write_decision(store, made)
    page = browser.open(desk_of(store, reviewer="bob", kind="second"))
    first = ready(page)
    assert page.is_disabled("#last")
    decide(page, "Space", "n")
    own = (ready(page), page.inner_text("#history"))
    press(page, "h")
    until(page, "document.querySelector('#history-title').textContent === 'What was said of the last one'")
    assert page.get_attribute("#last", "aria-pressed") == "true"
    # Whole, in sight or in reach: wrapped in its box, by Tab and arrows, and as a title.
    assert page.inner_text("#history-name") == page.get_attribute("#history-name", "title") == first
    assert len(first) > 500
    for name in ("#name", "#history-name"):
        box = page.evaluate(BOX, name)
        assert box["scrollWidth"] <= box["clientWidth"] and page.get_attribute(name, "tabindex") == "0"
    page.focus("#history-name")
    page.keyboard.press("End")
    until(page, "document.querySelector('#history-name').scrollTop > 0")
    assert page.inner_text("#status").startswith("That decision stays")
    press(page, "h")
    assert (page.inner_text("#name"), page.inner_text("#history")) == own and page.inner_text("#status") == ""
    assert page.get_attribute("#last", "aria-pressed") == "false"
    decide(page, "Space", "v")
    ready(page)
    decide(page, "u")
    page.wait_for_selector("#end:not([hidden])")
    assert page.is_hidden("#history") and page.inner_text("#end-head") == "Your decisions in this session"
    press(page, "h")
    page.wait_for_selector("#end #history:not([hidden])")
    assert page.locator("#history table").count() == 1 and page.inner_text("#end-list") != ""
    press(page, "h")
    assert page.is_hidden("#history")


BOX = """(name) => {
  const { scrollWidth, clientWidth } = document.querySelector(name);
  return { scrollWidth, clientWidth };
}"""


def test_the_line_at_the_bottom_is_about_what_was_done_last(browser, tmp_path):
    page = browser.open(desk_of(night(tmp_path, flagged=3, drawn=0)))
    ready(page)
    press(page, "z")
    assert page.inner_text("#status") == "There is nothing of this session to take back."
    press(page, "n")
    assert page.inner_text("#status").startswith("Look at it first")
    press(page, "Space")
    assert page.inner_text("#status") == ""
    decide(page, "v")
    ready(page)
    press(page, "z")
    until(page, "document.querySelector('#status').textContent === 'Taken back: decide again.'")
    ready(page)
    press(page, "Space")
    assert page.inner_text("#status") == "" and not is_blurred(page)


def test_two_reviewers_share_a_queue(browser, tmp_path):
    store = night(tmp_path, flagged=7, drawn=3)
    desks = [desk_of(store), desk_of(store, reviewer="bob")]
    pages = [browser.open(desk) for desk in desks]
    assert ready(pages[0]) != ready(pages[1])
    deadline = time.monotonic() + 60
    while len(rows_in(store)) < 10 and time.monotonic() < deadline:
        for page, desk in zip(pages, desks, strict=True):
            desk.refresh()  # each quarter of a minute, outside of tests
            if page.is_visible("#review"):
                ready(page)
                decide(page, "Space", "n")
            else:
                page.keyboard.press("r")
                page.wait_for_timeout(100)
    rows = rows_in(store)
    assert len(rows) == len({row["image_id"] for row in rows}) == 10
    assert {row["reviewer"] for row in rows} == {"ann", "bob"}
    for page, desk in zip(pages, desks, strict=True):
        desk.refresh()
        page.keyboard.press("r")
        until(page, "document.querySelector('#count').textContent === '10 of 10'")
        assert page.inner_text("#end-title") == "Everything here is decided."


def test_a_decision_that_is_not_saved_is_said_and_sent_again(browser, tmp_path, monkeypatch):
    browser.expected = {"503", "ERR_CONNECTION_REFUSED"}
    store = night(tmp_path, flagged=2, drawn=0)
    page = browser.open(desk_of(store))
    name = ready(page)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", lambda *_: (_ for _ in ()).throw(StoreError("the bucket is not there")))
        press(page, "Space", "v")
        until(page, "document.querySelector('#status').textContent.includes('is not saved yet')")
        assert (
            "the bucket is not there" in page.inner_text("#status") and page.get_attribute("#status", "class") == "bad"
        )
        assert page.inner_text("#name") == name and page.is_disabled("#not-violating")
        assert rows_in(store) == []
    until(page, "document.querySelector('#status').textContent === 'Saved: violating.'")
    assert [row["source_uri"] for row in rows_in(store)] == [name]
    ready(page)
    browser.serving.pop().__exit__(None, None, None)
    press(page, "Space", "n")
    until(page, "document.querySelector('#status').textContent.includes('is jobs.review still running?')")
    assert page.inner_text("#count") == "1 of 2" and len(rows_in(store)) == 1


def test_what_is_gone_or_changed_is_said_and_can_be_decided_as_not_seen(browser, tmp_path):
    store = night(tmp_path, flagged=2, drawn=0)
    (tmp_path / "source" / "mon-0.jpg").unlink()
    draw(tmp_path / "source" / "mon-1.jpg", 99, (50, 50))
    page = browser.open(desk_of(store))
    for words in ("gone since the scan", "another one than was scanned"):
        until(page, f"document.querySelector('#notice').textContent.includes({words!r})")
        page.wait_for_timeout(260)
        press(page, "Space", "v", "n")
        assert page.is_hidden("#picture") and page.is_disabled("#violating")
        decide(page, "x")
    page.wait_for_selector("#end:not([hidden])")
    assert {row["decision"] for row in rows_in(store)} == {"not seen"} and read_standing(store).labels == {}


def refuse(*_: Any) -> None:
    raise FetchError("fetch_denied", "Permission denied")


def test_a_store_that_refuses_is_said_in_words_and_asked_again(browser, tmp_path, monkeypatch):
    said: list[str] = []
    store = night(tmp_path, flagged=3, drawn=0)
    desk = desk_of(store, say=said.append)
    with monkeypatch.context() as patch:
        # Not by the file's mode: who runs the tests may read every file.
        patch.setattr("pipeline.steps.fetch._read_file", refuse)
        page = browser.open(desk)
        until(page, "document.querySelector('#notice').textContent.includes('refused access')")
        page.wait_for_timeout(260)
        assert page.inner_text("#notice") == (
            "It cannot be shown. The storage refused access to the object: Permission denied. "
            "You can try again (R), or leave it for later (S)."
        )
        assert page.is_visible("#retry") and page.is_hidden("#not-seen") and page.is_disabled("#unsure")
        press(page, "x", "u", "v")
        assert rows_in(store) == []
        # Who has tried again may go on without it.
        press(page, "r")
        page.wait_for_selector("#not-seen:not([hidden])")
        assert page.is_visible("#retry") and "or say that it could not be seen (X)" in page.inner_text("#notice")
    # Three pictures were asked for, one of them twice: a line for who runs the job.
    (line,) = said
    assert re.fullmatch(
        r"fetch_denied: pictures cannot be fetched, file:\S+/mon-\d\.jpg first\. It cannot be shown\. "
        r"The storage refused access to the object: Permission denied\. "
        r"Mend that, then try again on the page \(R\); others that fail so are not named here\.",
        line,
    )
    press(page, "r")
    for _ in range(3):  # those that had been fetched ahead were tried again too
        ready(page)
        assert page.is_hidden("#retry") and page.is_hidden("#notice")
        decide(page, "Space", "n")
    page.wait_for_selector("#end:not([hidden])")
    assert {row["decision"] for row in rows_in(store)} == {"not violating"} and len(said) == 1


def test_without_its_token_the_page_says_what_to_do(browser, tmp_path):
    browser.expected = {"401"}
    page = browser.open(desk_of(night(tmp_path, flagged=1, drawn=0)))
    ready(page)
    other = page.context.browser.new_context()
    browser.contexts.append(other)
    stranger = other.new_page()
    stranger.goto(f"http://127.0.0.1:{page.server.port}/")
    until(stranger, "document.querySelector('#status').textContent.includes('Open the address')")
    assert stranger.is_hidden("#review") and stranger.is_hidden("#end")


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(browser, tmp_path, width, scheme):
    store = night(tmp_path, flagged=2, drawn=0, categories=("gore", "weapon"))
    source = tmp_path / "source"
    Image.new("RGB", (2400, 900), (120, 60, 60)).save(source / "wide.jpg")
    about = of_file(source / "wide.jpg") | {}
    about["source_uri"] = parse_uri(str(source / "wide.jpg")).uri
    write_run(store, "tue", [flagged_row(about, "tue", "gore", 0.9)], categories=("gore", "weapon"))
    page = browser.open(desk_of(store, "tue"), width, 800, color_scheme=scheme)
    ready(page)
    page.keyboard.press("Space")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator("#picture").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert box["width"] / box["height"] == pytest.approx(2400 / 900, rel=0.02)
    for name in ("violating", "not-violating", "unsure"):
        button = page.locator(f"#{name}").bounding_box()
        assert button["y"] + button["height"] <= 800 and button["x"] + button["width"] <= width
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 8 and min(contrasts.values()) >= 4.5, contrasts


# Of every visible text its contrast with what is painted behind it, as WCAG computes it.
CONTRASTS = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = {};
  for (const node of document.querySelectorAll("button:not(:disabled), kbd, p, span, label, legend, select")) {
    if (!node.checkVisibility() || !node.textContent.trim() || node.closest("button:disabled")) continue;
    let behind = node;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const painted = [getComputedStyle(node).color, getComputedStyle(behind || document.body).backgroundColor];
    const pair = painted.map(light);
    found[node.id || node.textContent.trim()] = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  }
  return found;
}"""


def test_ten_thousand_flagged_images_are_still_quick(browser, tmp_path, record_property):
    """Bounds are several times what was measured (docs/review.md), so that a busy machine passes."""
    source = tmp_path / "source"
    source.mkdir()
    pattern = draw(source / "0.jpg", 1, (640, 480))
    for number in range(1, 10_500):
        os.link(pattern, source / f"{number}.jpg")
    etag = of_file(pattern)
    about = []
    for number in range(10_500):
        uri = parse_uri(str(source / f"{number}.jpg")).uri
        about.append(etag | {"source_uri": uri, "image_id": image_id(uri, etag["etag"])})
    store = Store(str(tmp_path / "out"))
    flagged = [flagged_row(row, "mon", "gore", 0.5 + number / 20_001) for number, row in enumerate(about[:10_000])]
    write_run(store, "mon", flagged, [drawn_row(row, "mon", [0.1]) for row in about[10_000:]])
    began = time.perf_counter()
    desk = desk_of(store)
    server_seconds = time.perf_counter() - began
    began = time.perf_counter()
    page = browser.open(desk)
    ready(page)
    open_seconds = time.perf_counter() - began - 0.26
    assert page.inner_text("#count") == "0 of 10,500"
    assert page.evaluate("document.querySelectorAll('*').length") < 120
    page.evaluate(NEXT_ITEM)
    seconds = []
    for _ in range(15):
        ready(page)
        press(page, "Space", "n")
        until(page, "window.took !== null")
        seconds.append(page.evaluate("window.took / 1000"))
        page.evaluate("window.took = null")
    seconds.sort()
    measured = {"server": server_seconds, "open": open_seconds, "median": seconds[7], "slowest": seconds[-1]}
    print({name: round(value, 3) for name, value in measured.items()})
    assert server_seconds < 10 and open_seconds < 10 and seconds[7] < 1 and seconds[-1] < 4, measured
    shutil.rmtree(source)


# From a press of N until the next picture is there, saved and painted.
NEXT_ITEM = """() => {
  window.took = null;
  let pressed = 0;
  document.addEventListener("keydown", (event) => { if (event.key === "n") pressed = performance.now(); }, true);
  const picture = document.querySelector("#picture");
  new MutationObserver(() => {
    if (!pressed || !picture.getAttribute("src")) return;
    const began = pressed;
    pressed = 0;
    picture.decode().then(() => requestAnimationFrame(() => { window.took = performance.now() - began; }));
  }).observe(picture, { attributes: true, attributeFilter: ["src"] });
}"""
