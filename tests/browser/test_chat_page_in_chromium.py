"""The chat page as a user sees it, in headless Chromium. Run by hand: `pytest -m browser`; CI has no browser."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

from ochat_train.conversations.template import TEMPLATES
from ochat_train.files import free_port
from ochat_train.serve import chat_page
from ochat_train.serve.__main__ import bind
from ochat_train.serve.side_by_side import ChatPage
from ochat_train.tokens.tokenizer import load_tokenizer
from tests.chat_model import write_chat_model
from tests.chat_server import KEY, ROOT, Server, serving
from tests.waiting import HANG_S

pytestmark = pytest.mark.browser

CUT = "was cut at the limit"
ELSEWHERE = "![a picture](http://198.51.100.1/x.png)"


def wait_for(find: Callable[[], Any]) -> Any:
    """What `find` finds, when it finds it."""
    deadline = time.monotonic() + HANG_S
    while not (found := find()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


class Browser:
    """Chromium on the page."""

    def __init__(self, pictures: Path) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,900"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver") or "")
        self.driver, self.pictures = webdriver.Chrome(options, service), pictures

    def all(self, css: str) -> list[Any]:
        return [one for one in self.driver.find_elements("css selector", css) if one.is_displayed()]

    def texts(self, css: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(one => one.innerText)"
        return list(self.driver.execute_script(script, css))

    def answers(self) -> list[str]:
        return [text for text in self.texts("[data-testid=bot]") if CUT not in text]

    def is_busy(self) -> bool:
        return bool(self.texts("button.stop-button"))

    def click(self, css: str) -> None:
        wait_for(lambda: self.all(css))[0].click()

    def ask(self, text: str) -> None:
        wait_for(lambda: self.all("textarea[placeholder='Ask something']"))[0].send_keys(text, "\ue007")  # Enter

    def ask_to_the_end(self, text: str) -> None:
        num_before = len(self.answers())
        self.ask(text)
        # A refusal may come before the stop button is seen.
        wait_for(lambda: len(self.answers()) > num_before and "…" not in self.answers() and not self.is_busy())

    def picture(self, name: str) -> None:
        time.sleep(0.5)
        assert self.driver.save_screenshot(str(self.pictures / f"{name}.png"))

    def hosts(self) -> set[str]:
        """Whom the browser asked since the last time."""
        messages = [orjson.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        failed = {one["params"]["requestId"] for one in messages if one["params"].get("blockedReason") == "csp"}
        return {urlsplit(one["request"]["url"]).netloc for one in sent if one["requestId"] not in failed} - {""}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tokenizer = load_tokenizer(str(ROOT / "data/quickstart_tokenizer"), TEMPLATES["openchat_v3.2"])
    model = write_chat_model(tmp_path_factory.mktemp("run") / "model", tokenizer, can_end=False)
    with serving(model.parent, "--engine", "transformers", "--device", "cpu") as made:
        yield made


@pytest.fixture(scope="module")
def address(server: Server) -> str:
    # A process of the tests' own, so that it is left when the server is gone.
    port = free_port()
    api = f"http://127.0.0.1:{server.port}/v1"
    page = ChatPage(api, f"http://127.0.0.1:{port}", "tiny-chat", ("Careful", "Hasty"), "Careful", 512)
    chat_page.start(page, bind("127.0.0.1", port), [KEY])
    return page.address


@pytest.fixture(scope="module")
def browser(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("pictures"))
    wait_for(lambda: is_there(made, address))  # the page imports Gradio, which takes a while
    yield made
    print(f"pictures in {made.pictures}")
    made.driver.quit()


def is_there(browser: Browser, address: str) -> bool:
    from selenium.common.exceptions import WebDriverException

    try:
        browser.driver.get(address)
    except WebDriverException:
        return False
    return True


def test_a_key_opens_the_page(browser: Browser) -> None:
    wait_for(lambda: browser.all("input[type=password]"))
    for key, is_right in (("wrong-key", False), (KEY, True)):
        name, password = browser.all("input")
        for field, text in ((name, "me"), (password, key)):
            field.clear()
            field.send_keys(text)
        browser.click("button.primary")
        expected = "textarea[placeholder='Ask something']" if is_right else "h2, p, .error"
        wait_for(lambda expected=expected: browser.all(expected))  # type: ignore[misc]  # bound now
        if not is_right:
            wait_for(lambda: "Incorrect" in browser.texts("body")[0])
            assert not browser.all("textarea")


def test_an_answer_grows(browser: Browser) -> None:
    browser.ask("Hi")
    lengths = {0}
    wait_for(browser.is_busy)
    while browser.is_busy():
        lengths.add(len("".join(browser.answers())))
    assert len(lengths) > 4
    browser.picture("answer")


def test_two_conditions_stand_side_by_side(browser: Browser) -> None:
    browser.click("button.toggle-button")  # the sidebar
    browser.click("button.lg")  # a new chat, since this one may have filled the positions
    browser.click("input[type=checkbox]")
    wait_for(lambda: len(browser.all("[data-testid=chatbot], .chatbot, .bubble-wrap")) >= 2)
    browser.ask_to_the_end("Hi")
    left, right = browser.answers()
    assert left != right
    places = [one.location["x"] for one in browser.all("[data-testid=bot]") if CUT not in one.text]
    assert places[0] + 300 < places[1]
    browser.picture("side by side")


def test_the_stop_button_ends_answers_on_the_page_and_at_the_server(browser: Browser, server: Server) -> None:
    browser.click("button.lg")
    num_before = len(server.lines())
    browser.ask("Tell me")
    browser.click("button.stop-button")
    wait_for(lambda: not browser.is_busy())
    wait_for(lambda: len(server.lines()) == num_before + 2)
    assert 499 in [line["status"] for line in server.lines()[num_before:]]
    stopped = browser.answers()
    time.sleep(1)
    assert browser.answers() == stopped
    browser.picture("stopped")


def test_a_closed_tab_ends_answers_at_the_server(browser: Browser, server: Server, address: str) -> None:
    browser.driver.get(address)
    num_before = len(server.lines())
    browser.ask("Tell me")
    wait_for(browser.is_busy)
    browser.driver.get("about:blank")
    wait_for(lambda: len(server.lines()) == num_before + 1)
    assert server.lines()[-1]["status"] == 499
    browser.driver.get(address)


def test_an_error_is_shown_and_no_other_host_is_asked(browser: Browser, address: str) -> None:
    browser.ask_to_the_end(ELSEWHERE + " word" * 600)
    assert "512 positions" in browser.answers()[-1] and "Error" in browser.answers()[-1]
    assert not browser.all("[data-testid=user] img") and ELSEWHERE in browser.texts("[data-testid=user]")[-1]
    assert browser.hosts() == {urlsplit(address).netloc}
    browser.picture("error")


def test_control_text_is_shown_as_it_was_written(browser: Browser) -> None:
    browser.ask_to_the_end("a<|end_of_turn|>b <tag>c")
    assert "a<|end_of_turn|>b <tag>c" in browser.texts("[data-testid=user]")[-1]


def test_a_narrow_page_shows_the_chat_first(browser: Browser, address: str) -> None:
    browser.driver.set_window_size(400, 800)
    browser.driver.get(address)
    wait_for(lambda: browser.all("textarea[placeholder='Ask something']"))
    browser.picture("narrow")
    sidebar = browser.driver.find_element("css selector", ".sidebar")
    assert sidebar.location["x"] + sidebar.size["width"] <= 20
    browser.driver.set_window_size(1400, 900)
    browser.driver.get(address)


def test_a_server_that_is_gone_is_said_so(browser: Browser, server: Server) -> None:
    server.process.terminate()
    server.process.wait(30)
    browser.ask_to_the_end("Are you there?")
    assert "The server does not answer at" in browser.answers()[-1]
    browser.picture("gone")
