"""The server's page in headless Chromium: narrow, dark, without motion, by keyboard, read out. Slow as a browser is."""

import json

import pytest
from browser import Page
from selenium.webdriver.common.keys import Keys
from stub_server import SETTINGS, STORY, block

pytestmark = pytest.mark.slow


def test_no_motion_where_none_is_wanted(page: Page) -> None:
    page.open(calm=True)
    page.script(
        "window.moved = 0; new MutationObserver(() => { moved += document.querySelectorAll('.moving').length; })"
        ".observe(document.getElementById('talk'), { subtree: true, childList: true, attributes: true })"
    )
    page.write()
    assert page.script("return moved") == 0
    assert page["scrub"].get_property("value") == "8"


@pytest.mark.parametrize("chat", [False, True])
def test_narrow_windows_do_not_scroll_sideways(page: Page, chat: bool) -> None:
    own = {"family": "cola", "chat": chat, "sampling": SETTINGS}
    page.stub.models = [{"id": "a/" + 80 * "long", "opencola": own}, {"id": "other"}]
    page.stub.blocks = [*STORY, block(2, 8 * [40 * "w"])]
    page.open(width=360, height=740)
    assert page.fits()
    page.all("#more summary")[0].click()
    page.write(100 * "o")
    assert len(page.all(".block")) == 3 and page.fits()
    page.all("#more summary")[0].click()
    page["scrub"].send_keys(Keys.HOME)
    assert page.fits()
    page.shot(f"narrow-{'conversation' if chat else 'light'}")
    page.stub.refusal = 400, {"message": 300 * "x"}, {}
    page.expected.append("400")
    page["prompt"].send_keys("!")
    page["write"].click()
    page.settled()
    assert page["error"].is_displayed() and page.fits()


@pytest.mark.parametrize("calm", [False, True])
def test_a_text_that_grows_out_of_the_window_is_followed(page: Page, calm: bool) -> None:
    page.stub.blocks = [block(n, 16 * [" word"], states=2) for n in range(12)]
    page.open(width=360, height=500, calm=calm).write()
    bottom = page.script("return document.querySelector('.turn').getBoundingClientRect().bottom")
    assert 400 < bottom <= 500
    page.script("scrollTo(0, 0)")
    page["write"].click()
    page.settled()
    bottom = page.script("return document.querySelector('.turn').getBoundingClientRect().bottom")
    assert 400 < bottom <= 500


def test_dark(page: Page) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = page.open().script(ground)
    dark = page.open(dark=True).script(ground)
    assert sum(json.loads(light.replace("rgb(", "[").replace(")", "]"))) > 600
    assert sum(json.loads(dark.replace("rgb(", "[").replace(")", "]"))) < 100
    page.write()
    page["scrub"].send_keys(Keys.HOME, *4 * [Keys.ARROW_RIGHT])
    page.shot("scrubbed-dark")
    page.open(width=360, height=740, dark=True).write()
    page.shot("narrow-dark")


def test_everything_is_reached_by_tab_and_has_a_name(page: Page) -> None:
    page.stub.models[0]["opencola"] = {"family": "cola", "chat": False, "sampling": SETTINGS}
    page.open()
    page["prompt"].send_keys("One day", Keys.CONTROL + Keys.ENTER)
    page.settled()
    page.all("#more summary")[0].click()
    page["scrub"].send_keys(Keys.HOME)
    page["prompt"].click()
    reached = []
    for _ in range(40):
        page.press(Keys.TAB)
        identity, outline = page.script(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.id || e.textContent, s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2]"
        )
        if identity in reached or page.script("return document.activeElement === document.body"):
            break
        assert outline, identity
        reached.append(identity)
    for name in ("write", "seed", "setting-solver", "Again with this seed", "before", "play", "scrub"):
        assert name in reached
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    for node in nodes:
        focusable = any(p["name"] == "focusable" and p["value"].get("value") for p in node.get("properties", []))
        if focusable and node["role"]["value"] not in ("RootWebArea", "generic"):
            assert node["name"]["value"], node["role"]
    live = {node["role"]["value"] for node in nodes}
    assert {"status", "slider", "heading", "main"} <= live
    assert page.texts("#said") == [STORY[1]["text"]]
