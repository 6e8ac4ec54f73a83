"""The server's page in headless Chromium, before a server that answers from a script.

Slow because a browser is started. Screenshots go to build/screenshots/, for a person to look at.
"""

import pytest
from browser import Page
from selenium.webdriver.common.keys import Keys
from stub_server import SETTINGS, STORY, block

pytestmark = pytest.mark.slow


def test_a_text_arrives_and_the_request_is_what_was_asked(page: Page) -> None:
    page.open()
    page["seed"].send_keys("41")
    page.write()
    assert page.texts(".text") == ["One day" + "".join(each["text"] for each in STORY)]
    assert page.texts(".block") == [each["text"] for each in STORY]
    path, body = page.stub.asked[0]
    assert path == "/v1/completions"
    streamed = {"stream": True, "stream_options": {"include_usage": True}, "watch": True}
    assert body == {"model": "tiny", "prompt": "One day", "max_tokens": 64, "temperature": 0, "seed": 41, **streamed}
    facts = page.texts(".facts span")
    assert facts[:2] == ["as long as allowed", f"{sum(len(each['opencola']['tokens']) for each in STORY)} tokens"]
    assert facts[2].endswith(" tokens/s") and facts[3].startswith("first block after ") and facts[4] == "seed 41"
    page.shot("written-light")


def test_seeds_are_new_each_time_and_can_be_used_again(page: Page) -> None:
    page.open().write()
    page["write"].click()
    page.settled()
    page.all(".facts button")[0].click()
    page.settled()
    seeds = [body["seed"] for _, body in page.stub.asked]
    assert seeds[0] != seeds[1] == seeds[2]
    assert page["seed"].get_property("value") == str(seeds[2])


def test_every_state_is_seen_in_its_place(page: Page) -> None:
    page.stub.blocks = STORY[:1]
    page.open(calm=False)
    page.script(
        "window.states = []; new MutationObserver(() => {"
        " const text = document.querySelector('.block')?.textContent; if (text !== states.at(-1)) states.push(text);"
        "}).observe(document.getElementById('talk'), { subtree: true, childList: true, characterData: true })"
    )
    page.write()
    states = ["".join(state["tokens"][2:]).replace("\n", "↵") for state in STORY[0]["opencola"]["states"]]
    distinct = [text for place, text in enumerate(states) if text != states[place - 1] or not place]
    drawn = [text for text in page.script("return states") if text]
    rest = iter(distinct)
    assert all(text in rest for text in drawn)  # in this order
    assert len(drawn) > 3 and drawn[-1] == states[-1]


def test_the_scrubber_by_keyboard(page: Page) -> None:
    page.open().write()
    states = STORY[1]["opencola"]["states"]
    assert page["which"].text == "Block 2 of 2" and page["time"].text == "t = 0.00"
    pixels = "return document.getElementById('map').toDataURL()"
    clean = page.script(pixels)
    page["scrub"].send_keys(Keys.HOME)
    assert page["time"].text == "t = 1.00" and page["step"].text == "state 1 of 9"
    assert page.texts(".block")[1] == "".join(states[0]["tokens"]).replace("\n", "↵")
    assert page.script(pixels) != clean
    page["scrub"].send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page["scrub"].get_attribute("aria-valuetext") == "t = 0.75, state 3 of 9"
    cells = page.texts(".cell")
    assert [cell.replace("·", " ").replace("↵", "\n") for cell in cells] == states[2]["tokens"]
    sure = page.script("return [...document.querySelectorAll('.cell')].map((c) => c.style.getPropertyValue('--sure'))")
    assert [float(value) for value in sure] == states[2]["margins"]
    page.shot("scrubbed-light")
    page["before"].send_keys(Keys.ENTER)
    assert page["which"].text == "Block 1 of 2"
    assert page.texts(".block") == [each["text"] for each in STORY]  # the other one is itself again
    assert page.texts(".cell.given") == ["One", "·day"]
    page["after"].send_keys(Keys.ENTER)
    page["scrub"].send_keys(Keys.HOME, Keys.END)
    assert page.texts(".block")[1] == STORY[1]["text"] and page.script(pixels) == clean


def test_the_map_shows_latents_by_rows_and_channels(page: Page) -> None:
    latents = [[-9.0, *7 * [0.0]], [*7 * [0.0], 9.0]]
    state = {"t": 1.0, "tokens": ["a", "b"], "margins": [0.1, 0.9], "latents": latents}
    page.stub.blocks = [{"text": "ab", "opencola": {"block": 0, "tokens": [[1, "a"], [2, "b"]], "states": [state]}}]
    page.open().write()
    image = "const map = document.getElementById('map'), { width, height } = map;"
    image += "return [width, height, ...map.getContext('2d').getImageData(0, 0, width, height).data]"
    width, height, *data = page.script(image)
    assert (width, height) == (8, 2)
    colours = [f"#{bytes(data[4 * i : 4 * i + 3]).hex()}" for i in range(16)]
    named = "return getComputedStyle(document.body).getPropertyValue(`--${arguments[0]}`).trim()"
    cold, zero, warm = (page.script(named, name) for name in ("cold", "paper", "accent"))
    assert colours == [cold, *14 * [zero], warm]
    assert page["map"].get_attribute("aria-label") == "Latents at t = 1.00: 2 rows, 8 channels"


def test_of_a_block_of_one_latent_all_states_are_rows(page: Page) -> None:
    page.stub.blocks = [block(n, [word], states=5) for n, word in enumerate([" found", " the", " box"])]
    page.open().write()
    states = page.stub.blocks[2]["opencola"]["states"]
    assert page.texts(".cell") == [state["tokens"][0].replace(" ", "·").replace("\n", "↵") for state in states]
    assert page.texts("#cells small") == [f"{state['t']:.2f}" for state in states]
    assert page["map"].get_attribute("aria-label") == "The latent in every state: 5 rows, 16 channels"
    page.all("#cells li")[2].click()
    assert page["time"].text == "t = 0.50" and page["scrub"].get_property("value") == "2"
    assert page.texts("#cells .now small") == ["0.50"]
    page.shot("one-latent-light")


def test_play_goes_through_time_and_on_through_the_text(page: Page) -> None:
    page.open().write()
    page.script(
        "window.seen = []; new MutationObserver(() => seen.push(['which', 'time'].map((id) => $(id).textContent)))"
        ".observe($('time'), { childList: true })"
    )

    def played() -> list[tuple[str, float]]:
        page.script("seen.splice(0)")
        page["play"].send_keys(Keys.SPACE)
        assert page["play"].get_attribute("aria-label") == "Pause"
        page.settled()
        assert page["play"].get_attribute("aria-label") == "Play"
        return [(which, float(time.removeprefix("t = "))) for which, time in page.script("return seen")]

    last = played()
    assert {which for which, _ in last} == {"Block 2 of 2"}
    times = [time for _, time in last]
    assert times[0] == 1 and times[-1] == 0 and times == sorted(times, reverse=True) and len(set(times)) > 3
    page["before"].click()
    both = played()
    assert [both[0], both[-1]] == [("Block 1 of 2", 1.0), ("Block 2 of 2", 0.0)]
    assert both == sorted(both, key=lambda state: (state[0], -state[1]))
    page["before"].click()
    page["through"].click()
    assert {which for which, _ in played()} == {"Block 1 of 2"}


def test_stop_ends_the_request(page: Page) -> None:
    page.stub.hold_after = 1
    page.open().write(wait=False)
    page.until(lambda: page.texts(".block") == [STORY[0]["text"]])
    assert not page["write"].is_enabled()
    page["stop"].click()
    assert page.stub.gone.wait(30)
    page.settled()
    assert page.texts(".facts span")[0] == "stopped" and page.texts(".block") == [STORY[0]["text"]]
    assert page["error"].is_displayed() is False and page["write"].is_enabled()
    page.stub.gone.clear()
    page["write"].click()
    page.until(lambda: page.texts(".block") == [STORY[0]["text"]])
    page.press(Keys.ESCAPE)
    assert page.stub.gone.wait(30)


def test_markup_in_a_text_stays_text(page: Page) -> None:
    evil = ["<script>", "window.hit = 1", "</script>", "<img src=x onerror='window.hit = 2'>", "<b>", "&amp;"]
    page.stub.blocks = [block(0, evil, states=3)]
    page.stub.models = [{"id": "<img src=x onerror='window.hit = 3'>", "object": "model"}]
    page.open().write("<i>")
    assert page.texts(".text") == ["<i>" + "".join(evil)]
    assert page.texts(".cell") == evil
    assert page.script("return window.hit ?? 0") == 0
    assert not page.all("main img, main i:not(.bars i):not(.key i), main b:not(summary b), main script")
    page.stub.refusal = 400, {"message": "<img src=x onerror='window.hit = 4'>"}, {}
    page.expected.append("400")
    page["write"].click()
    page.settled()
    assert page["errortext"].text.startswith("<img") and page.script("return window.hit ?? 0") == 0


def test_an_api_key_is_asked_for_and_kept_until_the_tab_is_closed(page: Page) -> None:
    page.stub.key = "open sesame"
    page.expected += ["401"]
    page.open()
    assert page["errortext"].text == "no such key"
    page.until(lambda: page["keyform"].is_displayed())
    page.shot("key-light")
    page["key"].send_keys("open sesame", Keys.ENTER)
    page.until(lambda: page.script("return models.length") == 1)
    assert not page["keyform"].is_displayed() and not page["error"].is_displayed()
    page.write()
    assert len(page.texts(".block")) == 2
    assert page.script("return [sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    page.open()
    assert not page["keyform"].is_displayed()


def test_errors_are_said_plainly(page: Page) -> None:
    page.open()
    assert not page["keyform"].is_displayed()
    error = {"message": "64 texts wait already", "type": "rate_limit_error", "code": "queue_full", "param": None}
    page.stub.refusal = 429, error, {"Retry_After": "2"}
    page.expected.append("429")
    page.write()
    assert page["errortext"].text == error["message"]
    assert page["errormore"].text == "Try again in 2 s. HTTP 429 · rate_limit_error · queue_full"
    assert page["prompt"].get_property("value") == "One day" and not page.all(".turn")
    page.shot("refused-light")
    page.stub.refusal, page.stub.broken = None, {"message": "the model broke", "type": "server_error"}
    page["write"].click()
    page.settled()
    assert page["errortext"].text == "the model broke" and len(page.all(".block")) == 2
    page.stub.broken, page.stub.ends = None, False
    page["write"].click()
    page.settled()
    assert page["errortext"].text == "The connection ended before the text did."
    page.stub.ends = True
    page["write"].click()
    page.settled()
    assert not page["error"].is_displayed()


def test_settings_come_from_the_server(page: Page) -> None:
    page.stub.models[0]["opencola"] = {"family": "cola", "chat": False, "sampling": SETTINGS}
    page.open()
    assert page["max_tokens"].get_property("value") == "32" and page["max_tokens"].get_attribute("max") == "512"
    assert page.texts(".all label") == ["steps", "guidance", "solver", "ignore eos", "stop (one a line)"]
    page.all("#more summary")[0].click()
    page.write()
    assert not {"steps", "guidance", "solver", "ignore_eos", "stop"} & set(page.stub.asked[0][1])
    page["setting-steps"].clear()
    page["setting-steps"].send_keys("4")
    page["setting-solver"].send_keys("heun")
    page["setting-ignore_eos"].send_keys(Keys.SPACE)
    page["setting-stop"].send_keys(".\n\n!")
    assert page["changed"].text == "4 changed"
    page.shot("settings-light")
    page["write"].click()
    page.settled()
    asked = page.stub.asked[1][1]
    assert asked["steps"] == 4 and asked["solver"] == "heun" and asked["ignore_eos"] and asked["stop"] == [".", "!"]
    assert "guidance" not in asked and asked["max_tokens"] == 32
    page["setting-steps"].clear()
    page["setting-steps"].send_keys("0")
    page.all("#more summary")[0].click()
    page["write"].click()
    assert page.script("return document.activeElement.id") == "setting-steps" and len(page.stub.asked) == 2
    page["reset"].click()
    assert page["changed"].text == "" and page["setting-steps"].get_property("value") == "16"


def test_families_without_states(page: Page) -> None:
    page.stub.blocks = [{"text": word} for word in ("One ", "by ", "one.")]
    page.open().write()
    assert page.texts(".text") == ["One dayOne by one."] and not page["look"].is_displayed()
    page.stub.blocks = STORY
    page["write"].click()
    page.settled()
    assert page["lens"].is_displayed()


def test_a_server_that_shows_no_states(page: Page) -> None:
    page.open()
    page.stub.sees = False
    page.stub.blocks = [{"text": each["text"]} for each in STORY]
    page.expected.append("400")
    page.write()
    assert page.texts(".block") == [each["text"] for each in STORY] and not page["error"].is_displayed()
    page["write"].click()
    page.settled()
    assert [body.get("watch") for _, body in page.stub.asked] == [True, None, None]


def test_a_conversation(page: Page) -> None:
    page.stub.models[0]["opencola"] = {"family": "cola", "chat": True, "sampling": SETTINGS}
    page.open()
    page["prompt"].send_keys("Who found it?", Keys.ENTER)
    page.settled()
    page["prompt"].send_keys("And", Keys.SHIFT + Keys.ENTER, Keys.NULL, "then?", Keys.ENTER)
    page.settled()
    answer = "".join(each["text"] for each in STORY)
    path, body = page.stub.asked[1]
    assert path == "/v1/chat/completions" and "prompt" not in body
    first = [{"role": "user", "content": "Who found it?"}, {"role": "assistant", "content": answer}]
    assert body["messages"] == [*first, {"role": "user", "content": "And\nthen?"}]
    assert page.texts(".turn .text") == ["Who found it?", answer, "And\nthen?", answer]
    page.shot("conversation-light")
    page.all(".facts button")[0].click()
    page.settled()
    assert page.stub.asked[2][1] == page.stub.asked[1][1] and len(page.all(".turn")) == 4
    page.stub.refusal = 429, {"message": "later"}, {}
    page.expected.append("429")
    page["prompt"].send_keys("More", Keys.ENTER)
    page.settled()
    assert len(page.all(".turn")) == 4 and page["prompt"].get_property("value") == "More"
    page["fresh"].click()
    page.stub.refusal = None
    page["write"].click()
    page.settled()
    assert page.stub.asked[-1][1]["messages"] == [{"role": "user", "content": "More"}]
