"""Settings: flags before variables before the file, unknown names refused with their place."""

from __future__ import annotations

import pytest

from penstock.server.config import ConfigError, ServerConfig, load_config, parse_flags


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "penstock.toml"

    def write(text):
        path.write_text(text)
        return path

    return write


def test_defaults(tmp_path):
    assert load_config({}, {}, tmp_path / "none.toml") == ServerConfig()
    assert ServerConfig().host == "127.0.0.1"


def test_order(file):
    path = file('[server]\nport = 1\nhost = "10.0.0.1"\nmax_body = 100\n')
    config = load_config({"port": "3"}, {"PENSTOCK_PORT": "2", "PENSTOCK_HOST": "10.0.0.2", "OTHER": "x"}, path)
    assert (config.port, config.host, config.max_body) == (3, "10.0.0.2", 100)


def test_text_and_numbers_are_taken_alike(tmp_path):
    none = tmp_path / "none.toml"
    for seconds in ("2.5", 2.5):
        assert load_config({"head_timeout": seconds}, {}, none).head_timeout == 2.5
    assert load_config({"idle_timeout": 3}, {}, none).idle_timeout == 3.0


@pytest.mark.parametrize(
    ("flags", "environment", "text", "place"),
    [
        ({"prot": 1}, {}, "", "prot: no such setting"),
        ({}, {"PENSTOCK_PROT": "1"}, "", "PENSTOCK_PROT: no such setting"),
        ({}, {}, "[server]\nprot = 1", "server.prot: no such setting"),
        ({}, {}, "[sever]\nport = 1", "sever: no such table"),
        ({}, {}, "port = 1", "port: no such table"),
        ({}, {}, "[server\n", "not TOML"),
        ({"port": 70000}, {}, "", "--port: Expected `int` <= 65535, got 70000"),
        ({"max_body": 0}, {}, "", "--max-body: "),
        ({}, {"PENSTOCK_PORT": "many"}, "", "PENSTOCK_PORT: Expected `int`, got 'many'"),
        ({}, {}, '[server]\nport = "x"', "server.port: "),
        ({}, {}, "[server]\nport = true", "server.port: "),
        ({}, {}, "[server]\nhead_timeout = 0", "server.head_timeout: "),
        ({}, {"PENSTOCK_HEAD_TIMEOUT": "nan"}, "", "PENSTOCK_HEAD_TIMEOUT: "),
        ({}, {}, "[limits.m]\nqueue_rows = 0", "limits.m.queue_rows: Expected `int` >= 1"),
        ({}, {}, "[limits.m]\nqueue-rows = 1", "limits.m: Object contains unknown field `queue-rows`"),
        ({}, {}, "[limits]\nm = 1", "limits.m: Expected `object`, got `int`"),
        ({"models": ""}, {}, "", "--models: expected a folder"),
        ({"resp_port": 0}, {"PENSTOCK_PASSWORD": ""}, "", "PENSTOCK_PASSWORD: expected a password"),
        ({"password": "x"}, {}, "", "--password: "),
        ({"grpc_port": 0}, {}, "", "--grpc-port: gRPC serves models"),
        ({"load": "m", "models": "m"}, {}, "", "--load: "),
    ],
)
def test_refused(file, flags, environment, text, place):
    with pytest.raises(ConfigError) as caught:
        load_config(flags, environment, file(text))
    assert place in str(caught.value)


def test_variables_of_other_parts_pass(tmp_path):
    file = tmp_path / "none.toml"
    assert load_config({}, {"PENSTOCK_CACHE": "x", "PENSTOCK_EXT": "http"}, file) == load_config({}, {}, file)


def test_flags():
    app, flags = parse_flags(["fraud.py", "--port", "0", "--max-body=5"])
    assert app == "fraud.py"
    assert flags == {"port": "0", "max_body": "5"}


@pytest.mark.parametrize("arguments", [[], ["a.py", "--prot", "1"], ["a.py", "b.py"], ["a.py", "--por", "1"]])
def test_flags_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags(arguments)
    assert caught.value.code == 2
    assert "penstock serve" in capsys.readouterr().err


def test_the_file_may_name_the_models(file, monkeypatch):
    monkeypatch.chdir(file('[server]\nmodels = "m"').parent)
    assert parse_flags([]) == (None, {})
    assert load_config({}, {}).models == "m"


def test_every_setting_has_help(capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--help"])
    shown = capsys.readouterr().out
    for name in ServerConfig.__struct_fields__:
        assert name == "limits" or "--" + name.replace("_", "-") in shown


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PENSTOCK_PORT", "tcp://10.0.0.1:8000"),
        ("PENSTOCK_RESP_PORT", "tcp://10.0.0.1:6379"),  # of a Service penstock-resp
        ("PENSTOCK_SERVICE_HOST", "10.0.0.1"),
        ("PENSTOCK_SERVICE_PORT", "8000"),
        ("PENSTOCK_SERVICE_PORT_HTTP", "8000"),
        ("PENSTOCK_PORT_8000_TCP", "tcp://10.0.0.1:8000"),
        ("PENSTOCK_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("PENSTOCK_PORT_9000_UDP_PROTO", "udp"),
        ("PENSTOCK_CANARY_SERVICE_HOST", "10.0.0.1"),
        ("PENSTOCK_CANARY_SERVICE_PORT_GRPC", "9000"),
        ("PENSTOCK_CANARY_PORT", "tcp://10.0.0.1:8000"),
        ("PENSTOCK_CANARY_PORT_8000_TCP_PORT", "8000"),
    ],
)
def test_what_kubernetes_sets_for_a_service_is_left_out(tmp_path, capsys, variable, value):
    config = load_config({}, {variable: value, "PENSTOCK_MAX_BODY": "100"}, tmp_path / "none.toml")
    assert (config.port, config.resp_port, config.max_body) == (8000, None, 100)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"warning: left out, as Kubernetes sets them for a Service: {variable};" in said[0]


def test_all_that_kubernetes_sets_is_one_warning(tmp_path, capsys):
    variables = {"PENSTOCK_SERVICE_HOST": "10.0.0.1", "PENSTOCK_PORT": "tcp://10.0.0.1:8000"}
    assert load_config({"port": 1}, variables, tmp_path / "none.toml").port == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "PENSTOCK_PORT, PENSTOCK_SERVICE_HOST;" in said[0]
    assert load_config({}, {"PENSTOCK_PORT": "81"}, tmp_path / "none.toml").port == 81
    assert capsys.readouterr().err == ""
