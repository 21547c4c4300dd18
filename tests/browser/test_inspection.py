"""The page of a network in a real browser: it opens, answers, finds, and works by keyboard.

    pytest -m browser tests/browser      (docs/inspect.md says what to install)

Takes the pictures in docs/pictures.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.browser.conftest import DOCS, Page

pytestmark = pytest.mark.browser


@pytest.fixture
def opened(browser: Any, page: Page) -> Any:
    """The browser with a page just opened."""
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(page.path.as_uri())
    return browser


def data(browser: Any) -> dict[str, Any]:
    text = browser.execute_script("return document.getElementById('data').textContent")
    found: dict[str, Any] = json.loads(text)
    return found


def node_of(browser: Any, module: str) -> dict[str, Any]:
    """The last node of a layer: the one whose value is the layer's output."""
    found: dict[str, Any] = [n for n in data(browser)["nodes"] if n["module"] == module][-1]
    return found


def bring(browser: Any, module: str) -> Any:
    """Search for a layer, go to it, end the search; its box on the screen."""
    press(browser, "/" + module + "\ue007")
    name = node_of(browser, module)["name"]
    press(browser, "\ue00c")
    return browser.find_element("css selector", f'[data-node="{name}"] .box')


def press(browser: Any, keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(keys).perform()


def click(browser: Any, element: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).move_to_element(element).click().perform()


def texts(browser: Any, selector: str) -> list[str]:
    return [e.text for e in browser.find_elements("css selector", selector)]


def test_it_opens_without_a_word_in_the_console(opened: Any) -> None:
    assert "ready" in opened.find_element("css selector", "body").get_property("dataset")
    assert opened.get_log("browser") == []
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_groups_and_nodes_are_there(opened: Any) -> None:
    known = data(opened)
    rows = opened.find_elements("css selector", ".row")
    assert [r.get_attribute("data-group") for r in rows] == [str(g["id"]) for g in known["groups"]]
    boxes = opened.find_elements("css selector", ".node")
    assert [b.get_attribute("data-node") for b in boxes] == [n["name"] for n in known["nodes"]]
    joins = {n["joins"] for n in known["nodes"]} - {""}
    for kind in joins:
        assert opened.find_elements("css selector", f".wire.{kind}")
    assert joins


def test_a_click_shows_the_members_of_the_group(opened: Any, page: Page) -> None:
    box = bring(opened, page.network.layer)
    click(opened, box)
    node = node_of(opened, page.network.layer)
    group = next(g for g in data(opened)["groups"] if g["id"] == node["groups"][0][0])
    assert texts(opened, ".member") == [f"{name} ({size})" for name, size in group["members"]]
    lit = opened.find_elements("css selector", ".node.on")
    carriers = {n["name"] for n in data(opened)["nodes"] if group["id"] in dict(n["groups"])}
    assert {e.get_attribute("data-node") for e in lit} == carriers
    detail = opened.find_element("css selector", "#detail").text
    assert f"{group['size']} channels, {group['removable']} can go" in detail
    assert f"{group['dead']} dead" in detail
    opened.save_screenshot(str(DOCS / f"{page.path.stem}.png"))


def test_a_pinned_group_says_why_and_where(opened: Any) -> None:
    pinned = next(g for g in data(opened)["groups"] if g["pins"])
    channels, reason, _, _, line = pinned["pins"][0]
    click(opened, opened.find_element("css selector", f'[data-group="{pinned["id"]}"]'))
    text = opened.find_element("css selector", ".pin").text
    assert text.startswith(f"{channels} channels: {reason}")
    assert line in text


def test_search_finds_a_layer_and_dims_the_rest(opened: Any, page: Page) -> None:
    press(opened, "/" + page.network.layer)
    hits = [n["name"] for n in data(opened)["nodes"] if page.network.layer in n["module"]]
    assert texts(opened, "#found") == [f"{len(hits)} found"]
    lit = [e.get_attribute("data-node") for e in opened.find_elements("css selector", ".node.on")]
    assert lit == hits
    assert len(opened.find_elements("css selector", ".row")) < len(data(opened)["groups"])
    press(opened, "\ue007")
    here = opened.find_element("css selector", ".node.here")
    assert here.get_attribute("data-node") == hits[0]
    box, stage = here.rect, opened.find_element("css selector", "#stage").rect
    assert stage["y"] <= box["y"] <= stage["y"] + stage["height"] - box["height"]


def test_keys_go_from_node_to_node_and_zoom(opened: Any) -> None:
    names = [n["name"] for n in data(opened)["nodes"]]

    def here() -> list[str]:
        return [
            e.get_attribute("data-node") for e in opened.find_elements("css selector", ".node.here")
        ]

    press(opened, "jj\ue015")  # down
    assert here() == [names[2]]
    press(opened, "k")
    assert here() == [names[1]]
    press(opened, "\ue00c")  # escape
    assert here() == []
    before = opened.find_element("css selector", ".node .box").rect["width"]
    press(opened, "+")
    assert opened.find_element("css selector", ".node .box").rect["width"] > before
    press(opened, "0")
    last = opened.find_element("css selector", f'[data-node="{names[-1]}"]').rect
    assert last["y"] + last["height"] <= opened.execute_script("return innerHeight")


def test_it_is_small_and_quick(browser: Any, page: Page) -> None:
    """Processor time, and not that of the clock, where others may use the machine."""
    start = time.perf_counter()
    browser.get(page.path.as_uri())
    element = browser.find_element("css selector", ".node:nth-of-type(2) .box")
    click(browser, element)
    assert browser.find_elements("css selector", "#detail h2")
    answered = time.perf_counter() - start
    size = page.path.stat().st_size
    print(f"\n{page.path.stem}: inspect {page.seconds:.1f} s, {page.processor:.1f} s of processor; "
          f"{size / 1e6:.2f} MB; first click answered after {answered:.2f} s")  # fmt: skip
    assert size < 2_000_000
    assert page.processor < 10
    assert answered < 2


def test_at_night_it_is_dark(browser: Any, page: Page) -> None:
    """Text is lighter than what it is on, and the other way round by day."""
    browser.get(page.path.as_uri())
    script = """const s = getComputedStyle(document.body);
        return [s.color, s.backgroundColor, getComputedStyle(document.querySelector(".label")).fill]
          .map(c => c.match(/\\d+/g).map(Number).reduce((a, b) => a + b))"""
    for scheme, sign in (("dark", 1), ("light", -1)):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        ink, paper, label = browser.execute_script(script)
        assert sign * (ink - paper) > 400
        assert sign * (label - paper) > 400
