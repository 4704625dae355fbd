from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign import cli, config, keys
from diffalign.errors import ConfigError
from diffalign.judges.endpoint import Endpoint
from diffalign.synthesis.self_sampled import OwnResponses
from tests.judges.chat_server import serving
from tests.test_config import Outer, written


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    monkeypatch.setattr(keys, "_named", set())
    for variable in ("OPENAI_API_KEY", "HF_TOKEN", "OTHER"):
        monkeypatch.setenv(variable, f"value-of-{variable}")


@pytest.mark.parametrize(
    ("address", "variable", "sent"),
    [
        ("https://api.openai.com/v1", None, "OPENAI_API_KEY"),
        ("https://eu.api.openai.com/v1", None, "OPENAI_API_KEY"),
        ("https://router.huggingface.co/v1", None, "HF_TOKEN"),
        ("http://127.0.0.1:8000/v1", None, "OPENAI_API_KEY"),
        ("http://[::1]:8000/v1", None, "OPENAI_API_KEY"),
        ("http://LOCALHOST/v1", "HF_TOKEN", "HF_TOKEN"),
        ("https://api.openai.com/v1", "OPENAI_API_KEY", "OPENAI_API_KEY"),
        ("https://example.org/v1", None, None),
        ("http://10.0.0.5:8000/v1", None, None),
        ("https://api.openai.com.example.org/v1", None, None),
        ("https://notapi.openai.com.example/v1", None, None),
        ("http://127.0.0.1.example.org/v1", None, None),
    ],
)
def test_a_key_goes_unasked_to_its_own_host_and_to_this_machine(address, variable, sent):
    assert keys.variable_for(address, variable) == sent


@pytest.mark.parametrize(
    ("address", "variable"),
    [
        ("https://example.org/v1", "OPENAI_API_KEY"),
        ("https://example.org/v1", "HF_TOKEN"),
        ("https://api.openai.com/v1", "HF_TOKEN"),
        ("https://huggingface.co/v1", "OPENAI_API_KEY"),
        ("https://api.openai.com/v1", "OTHER"),
        ("http://127.0.0.1:8000/v1", "OTHER"),
        ("https://xhuggingface.co/v1", "HF_TOKEN"),
    ],
)
def test_anything_else_must_be_named_on_the_command_line(address, variable):
    with pytest.raises(ConfigError, match=rf"would send the environment variable {variable} to"):
        keys.variable_for(address, variable)
    keys.name_on_command_line({"judge": {"key_variable": variable}})
    assert keys.variable_for(address, variable) == variable


def test_plain_http_carries_a_key_to_this_machine_alone():
    keys.name_on_command_line({"key_variable": "OTHER"})
    assert keys.variable_for("http://localhost:1/v1", "OTHER") == "OTHER"
    for address in ("http://example.org/v1", "http://192.168.0.2/v1", "http://api.openai.com/v1"):
        with pytest.raises(ConfigError, match="over plain http"):
            keys.variable_for(address, "OTHER")
    with pytest.raises(ConfigError, match="over plain http"):
        keys.variable_for("http://api.openai.com/v1", None)


def test_a_named_variable_that_is_not_set_is_said(monkeypatch):
    keys.name_on_command_line({"key_variable": "OTHER"})
    monkeypatch.delenv("OTHER")
    with pytest.raises(ConfigError, match=r"OTHER, which is .* for x\.org, is not set"):
        keys.variable_for("https://x.org/v1", "OTHER")


@pytest.mark.parametrize(
    "address",
    [
        "https://user:hunter22@example.org/v1",
        "https://example.org/v1?token=hunter22",
        "https://example.org/v1#hunter22",
        "http://example.org\\@127.0.0.1/v1",
        "http://127.0.0.1 .example.org/hunter22",
        "https://[hunter22/v1",
        "https:///hunter22",
        "https://x:hunter22/v1",
        "ftp://user:hunter22@example.org",
    ],
)
def test_an_address_with_a_secret_or_a_trick_is_refused_and_not_shown(address):
    with pytest.raises(ValueError, match="address ") as error:
        Endpoint(address=address, model="m")
    assert "hunter22" not in str(error.value)


def judge(tmp_path, address: str, *overrides: str) -> Endpoint:
    path = tmp_path / "run.yaml"
    settings = {"kind": "endpoint", "address": address, "model": "m", "key_variable": "OTHER"}
    path.write_text(yaml.safe_dump({"judge": settings}))
    loaded = config.load(OwnResponses, path, overrides).judge
    assert isinstance(loaded, Endpoint)
    return loaded


def test_a_config_file_alone_sends_nothing_and_the_command_line_says_what_it_sends(
    tmp_path, capsys
):
    with serving(lambda prompt: "4") as server:
        with pytest.raises(ConfigError, match=r"would send the environment variable OTHER"):
            list(judge(tmp_path, server.address).replies(["a"]))
        assert server.requests == []
        list(judge(tmp_path, server.address, "judge.key_variable=OTHER").replies(["a"]))
        assert server.keys == ["Bearer value-of-OTHER"]
    said = capsys.readouterr().err
    assert f"The key in OTHER is sent to {server.address[7:-3]}" in said
    assert "value-of" not in said


def test_a_server_that_repeats_the_key_or_redirects_gets_no_further(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "hunter22")
    with serving(lambda prompt: "4") as server, serving(lambda prompt: "4") as other:
        endpoint = Endpoint(address=server.address, model="m")
        server.failures, server.headers = [307], {"Location": f"{other.address}/chat/completions"}
        with pytest.raises(ConfigError, match="HTTP 307"):
            list(endpoint.replies(["a"]))
        assert other.requests == []
        server.failures, server.said = [403], b"wrong key hunter22"
        with pytest.raises(ConfigError, match=r"wrong key \*\*\*"):
            list(endpoint.replies(["a"]))


@pytest.mark.parametrize(
    "value",
    [
        "https://user:hunter22@example.org/x",
        "https://example.org/x?token=hunter22",
        "s3://u:hunter22@bucket",
        "hf_hunter22hunter22hunter22",
    ],
)
def test_a_config_with_credentials_is_refused_and_they_are_not_shown(tmp_path, value):
    path = written(tmp_path, "path: x\nobjective: {kind: dpo, beta: 1}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: names\[1\] holds a password or key") as e:
        config.load(Outer, path, [f"names=[a, '{value}']"])
    assert "hunter22" not in str(e.value)


def test_an_error_on_the_screen_hides_keys(monkeypatch, capsys):
    def fail() -> None:
        raise ConfigError("https://u:p4ssw0rd@x/?a=1&access_token=abc value-of-HF_TOKEN \udcff")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli, "_refuse_foreign_flags", lambda arguments: None)
    with pytest.raises(SystemExit):
        cli.main()
    assert "https://***@x/?a=1&access_token=*** *** \\udcff" in capsys.readouterr().err


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.text() | st.text("htps:/@.?#[]\\%127locaexm0 ").map(lambda text: f"http://{text}"))
def test_any_address_is_taken_or_refused_in_a_sentence(address):
    try:
        Endpoint(address=address, model="m")
    except ValueError:
        return
    try:
        keys.variable_for(address, None)
    except ConfigError:
        return
