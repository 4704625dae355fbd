"""Win rates of responses: published values, responses that are alike, and judges that cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from diffalign import config
from diffalign.data.responses.questions import Question
from diffalign.data.responses.records import Turn
from diffalign.errors import ConfigError, EndpointError, ModelError
from diffalign.judges.endpoint import Endpoint
from diffalign.models.vlm.config import VLM
from diffalign.rewards.base import AbstractReward
from diffalign.rewards.judged import Judged
from diffalign.rewards.win_rate import WinRate
from diffalign.rewards.yes_no import YesNo
from tests.judges.chat_server import serving
from tests.responses import random_image
from tests.scorers.test_vlm_yes import choice

LLAVA = str(Path(__file__).parents[2] / "assets/playground/llava")


@dataclass(frozen=True, kw_only=True)
class Read(AbstractReward):
    """The number that a response is."""

    def score(self, question: Question, responses: Sequence[str]) -> list[float]:
        return [float(response) for response in responses]


@pytest.fixture
def question(tmp_path):
    random_image("question", 0, size=(20, 12)).save(tmp_path / "0.png")
    asked = Turn(role="user", text="<image>\nWhat is {second}?")
    return Question(sample_id="q", images=(tmp_path / "0.png",), turns=(asked,), response=None)


def test_scores_become_the_published_rates(question):
    """uclaml/SPPO, which counts a response as half a win against itself among five."""
    rates = WinRate(reward=Read()).score(question, ["1.2", "-0.3", "0.5", "-1.0", "0.1"])
    with_itself = [0.5 + (rate - 0.5) * 4 / 5 for rate in rates]
    published = [0.727254372967, 0.412390230947, 0.587609769053, 0.272745627033, 0.5]
    assert with_itself == pytest.approx(published, abs=1e-11)
    warmer = WinRate(reward=Read(), temperature=10).score(question, ["12", "-3", "5", "-10", "1"])
    assert warmer == pytest.approx(rates, abs=1e-12)


def test_responses_of_the_same_text_tie_and_each_counts(question):
    three = WinRate(reward=Read()).score(question, ["0", "1", "0"])
    won = 1 / (1 + math.exp(-1))
    assert three == pytest.approx([(1 - won + 0.5) / 2, won, (1 - won + 0.5) / 2])
    assert WinRate(reward=Read()).score(question, ["1", "1"]) == [0.5, 0.5]


def test_what_earns_nothing_has_no_rate_and_is_no_opponent(question):
    rates = WinRate(reward=Read()).score(question, ["0", "nan", "1"])
    assert math.isnan(rates[1])
    assert [rates[0], rates[2]] == pytest.approx(WinRate(reward=Read()).score(question, ["0", "1"]))


def test_a_reward_passes_on_what_the_other_one_cannot_read(question):
    assert "says neither yes nor no" in str(WinRate(reward=YesNo()).obstacle(question))
    with pytest.raises(ValueError, match="compares responses itself"):
        WinRate(reward=WinRate(reward=YesNo()))


# --- a judge ------------------------------------------------------------------------------------


def parts(content) -> tuple[str, str]:
    """Both responses, as the judge was shown them."""
    text = content[-1]["text"]
    _, _, rest = text.partition("Response 1: ")
    first, _, rest = rest.partition("\n\nResponse 2: ")
    return first, rest.partition("\n\n")[0]


def judged(server, **changes) -> Judged:
    endpoint = Endpoint(address=server.address, model="tiny", pause_s=0.0, attempts=2)
    return Judged(endpoint=endpoint, **changes)


PREFERRED = {("a", "b"): 0.8, ("a", "c"): 0.6, ("a", "d"): 0.9}
PREFERRED |= {("b", "c"): 0.7, ("b", "d"): 0.4, ("c", "d"): 0.55}
LEANS = 0.05
"""How much more probable the judge finds the one that is shown first."""


def test_a_judge_is_asked_in_both_orders_and_its_place_does_not_count(question):
    def reply(content):
        one, other = parts(content)
        first = PREFERRED.get((one, other)) or 1 - PREFERRED[other, one]
        return choice(("1", (first + LEANS) / 2), ("2", (1 - first - LEANS) / 2), ("The", 0.5))

    with serving(reply) as server:
        rates = judged(server).score(question, ["a", "b", "c", "d"])
        assert len(server.requests) == 12
    published = [0.766666666667, 0.433333333333, 0.416666666667, 0.383333333333]
    assert rates == pytest.approx(published, abs=1e-6)
    shown = server.requests[0]["messages"][0]["content"]
    assert shown[0]["type"] == "image_url"
    assert shown[1]["text"].startswith("What is {second}?\n\nResponse 1: ")  # asked as it stands


def test_a_response_that_the_judge_says_nothing_of_has_no_rate(question):
    def reply(content):
        if "nonsense" in parts(content):
            return choice(("Neither", 0.9))
        return choice(("1", 0.9), ("2", 0.1)) if parts(content)[0] == "a" else choice(("2", 0.9))

    with serving(reply) as server:
        rates = judged(server).score(question, ["nonsense", "a", "b"])
        assert all(map(math.isnan, judged(server).score(question, ["nonsense", "a"])))
    assert math.isnan(rates[0])
    assert rates[1:] == pytest.approx([0.95, 0.05])


def test_a_judge_that_is_down_says_so(question):
    with serving(lambda content: choice(("1", 0.9))) as server:
        server.failures += [503] * 4
        with pytest.raises(EndpointError, match="503"):
            judged(server).score(question, ["a", "b"])


def test_a_judge_on_this_machine_prefers_as_its_first_token_does(question):
    judge = Judged(model=VLM(path=LLAVA))
    rates = judge.score(question, ["a red circle", "a blue square"])
    assert sum(rates) == pytest.approx(1) and rates[0] != rates[1]
    swapped = judge.score(question, ["a blue square", "a red circle"])
    assert swapped[::-1] == pytest.approx(rates, abs=1e-6)
    assert replace(judge, template="{question}{second}{first}").fingerprint != judge.fingerprint


def test_settings_that_ask_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"template must hold \{first\} and \{second\}"):
        Judged(model=VLM(path=LLAVA), template="{question}")
    with pytest.raises(ConfigError, match=r"rollouts.rewards.* give one of them"):
        config.load(Judged, None, [])
    with pytest.raises(ModelError, match="there is no"):
        Judged(model=VLM(path=str(tmp_path / "nowhere"))).check()
