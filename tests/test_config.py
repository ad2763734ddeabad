"Settings: one file holds them all, the strongest place wins, and a slip is named with its remedy."
import os
import re

import pytest
import yaml

from bnml.core.base import ConfigError, source
from bnml.core.config import file_layer, leaves
from bnml.ops.settings import Settings, load_settings, settings_sources
from tests.shell import forked, here


def run(*words, **env): return here(words, os.environ["BNML_HOME"], env=env)


def test_the_shipped_file_holds_every_setting_at_its_default():
    written = file_layer(Settings, source() / "bot.yaml").values
    assert set(written) == set(leaves(Settings))
    assert load_settings(source() / "bot.yaml", env={}) == Settings()


def written_lines(node, above="") -> dict:
    "Dotted path → line of every key of a YAML document."
    out = {}
    for key, value in node.value:
        path = above + key.value
        inner = written_lines(value, path + ".") if isinstance(value, yaml.MappingNode) and value.value else {}
        out |= inner or {path: key.start_mark.line}
    return out


def unexplained(text: str) -> list[str]:
    "Settings without a word of their own beside them."
    lines, there = text.splitlines(), written_lines(yaml.compose(text))
    said = {path: lines[n].partition(" # ")[2].strip() for path, n in there.items()}
    return [path for path, words in said.items() if len(words.split()) < 2 or words.lower() == path.rpartition(".")[2].replace("_", " ")]


def test_every_setting_of_the_shipped_file_says_what_it_does():
    text = (source() / "bot.yaml").read_text()
    assert set(written_lines(yaml.compose(text))) == set(leaves(Settings))  # nothing is missing, nothing is unknown
    assert unexplained(text) == []
    assert unexplained("risk:\n  max_positions: 5\n  leader: x  # of all\nmode: paper  # mode\n") == ["risk.max_positions", "mode"]


@pytest.mark.parametrize("path", ["risk.max_positions", "model.lstm.hidden", "exchange.withdraw_keys", "mode"])
def test_a_setting_that_is_left_out_or_misspelt_is_noticed(own_home, path):
    name, lines = path.rpartition(".")[2], (source() / "bot.yaml").read_text().splitlines()
    n = written_lines(yaml.compose("\n".join(lines)))[path]
    left, wrong = "\n".join(lines[:n] + lines[n + 1:]), "\n".join([*lines[:n], lines[n].replace(name, name + "x", 1), *lines[n + 1:]])
    assert set(leaves(Settings)) - set(written_lines(yaml.compose(left))) == {path}
    (own_home / "bot.yaml").write_text(wrong)
    with pytest.raises(ConfigError, match=f"did you mean {re.escape(path)}"): load_settings(env={})


def test_the_strongest_place_wins(own_home):
    path = "risk.max_positions"
    assert load_settings(env={}).risk.max_positions == 5
    (own_home / "bot.yaml").write_text("risk: {max_positions: 4}\n")
    assert load_settings(env={}).risk.max_positions == 4
    (own_home / "other.yaml").write_text("risk: {max_positions: 6}\n")
    assert load_settings(env={"BNML_CONFIG": str(own_home / "other.yaml")}).risk.max_positions == 6
    (own_home / ".env").write_text("BNML__RISK__MAX_POSITIONS=3\n")
    assert load_settings(env={}).risk.max_positions == 3
    env = {"BNML__RISK__MAX_POSITIONS": "2"}
    assert load_settings(env=env).risk.max_positions == 2
    assert load_settings(env=env, flags={path: 1}).risk.max_positions == 1
    assert settings_sources(env=env)[path] == "BNML__RISK__MAX_POSITIONS"


@pytest.mark.parametrize("env, said", [
    ({"BNML__RISK__MAX_POSITION": "3"}, "did you mean risk.max_positions?"),
    ({"BNML__RISK__MAX_POSITIONS": "0"}, "BNML__RISK__MAX_POSITIONS: risk.max_positions: input should be greater than or equal to 1"),
    ({"MAX_POSITION_PERCENT": "20"}, "MAX_POSITION_PERCENT=20: must be a fraction"),
    ({"MAX_DRAWDOWN": "0.05"}, "MAX_DRAWDOWN=0.05: must be percent"),
    ({"MAX_DRAWDOWN": "101"}, "between 0.5 and 100"),
    ({"BNML__MODE": "real"}, "use paper, testnet or live"),
    ({"BNML__EXCHANGE__REST_URL": "http://127.0.0.1:1"}, "set rest_url, ws_url and ws_api_url together"),
    ({"BNML__DATA__INTERVAL": "1x"}, "1x"),
    ({"BNML_CONFIG": "/nowhere.yaml"}, "settings file /nowhere.yaml does not exist"),
])
def test_a_slip_is_one_sentence_and_code_78(env, said):
    code, out, err = run("config", "check", **env)
    assert (code, out) == (78, "") and said in err and "Traceback" not in err and err.count("\n") == 1, err


def test_a_process_says_the_same(own_home):
    env = {"MAX_POSITION_PERCENT": "20"}
    told = forked(("config", "check"), own_home, env=env)
    assert told == run("config", "check", **env) and told[0] == 78


def test_lists_come_as_commas_or_json():
    for text in ("BTCUSDT,ETH/USDT", '["BTCUSDT", "ETHUSDT"]'):
        assert load_settings(env={"BNML__UNIVERSE__SYMBOLS": text}).universe.symbols == ("BTCUSDT", "ETHUSDT")


def test_both_limits_are_printed_in_words_and_secrets_are_not():
    code, out, _ = run("config", "show", MAX_POSITION_PERCENT="0.2", MAX_DRAWDOWN="5.0", POSTGRES_URL="postgresql+psycopg://bot:hunter22@db/x")
    assert code == 0 and "at most 20 % of equity" in out and "5 % below its peak" in out
    assert "hunter22" not in out and "bot:***@db" in out


def test_env_example_names_nothing_unknown(own_home):
    (own_home / ".env").write_text((source() / ".env.example").read_text())
    assert load_settings(env={}).exchange.id == "binance"
