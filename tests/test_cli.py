"""The command line: `penstock check` prints the plan, or every problem with its place; exit codes; what it imports."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import penstock
from penstock.cli import main

ENGINE = str(Path(penstock.__file__).resolve().parents[1])

APP = """
from penstock import *

class Pay(Event, event_id="id", lateness="2h"):
    id: str
    customer: str
    amount: float
    at: Timestamp
    note: str | None = None

spend = FeatureView(
    "spend", entity="customer", source=Pay, include_request_event=True,
    aggregations=[
        Aggregation("count", windows=["1d", "36h"], where="amount > 1"),
        Aggregation("mean", "amount", windows=["7d"], default=0.5, closed="left"),
    ],
)

@on_demand_feature_view(mode="python")
def night(at: Timestamp) -> bool:
    return at.hour <= 6

fraud = Pipeline(
    "fraud", event=Pay, features=["amount", night, spend],
    experiments=[Experiment("challenger", unit="customer", arms={"tree": 0.25, "xgb": 0.75})],
    model=by_arm("challenger", tree="fraud@1", xgb="fraud@2"), models=["shadow@3"],
    rules=[Rule("burst", when="spend.count_1d > 30", action="review")], fallback="manual",
)
"""

CHECKED = """\
app {name}: plan {fingerprint}

Events
  event  time  id  lateness  max skew  fields
  -----  ----  --  --------  --------  ---------------------------------------------------------------------------
  Pay    at    id  2h        5m        id: string, customer: string, amount: float64, at: timestamp, note: string?

Feature views
  view   entity                   request event  feature               type     window  edges     default  where
  -----  -----------------------  -------------  --------------------  -------  ------  --------  -------  ----------
  spend  customer (Pay.customer)  yes            spend.count_1d        int64    1d      (T-W, T]  -        amount > 1
                                                 spend.count_36h       int64    36h     (T-W, T]  -        amount > 1
                                                 spend.mean_amount_7d  float64  7d      [T-W, T)  0.5      -

State
  source  entity    columns  kept     layout
  ------  --------  -------  -------  ----------------
  Pay     customer  amount   7d + 2h  {layout:016x}

Pipeline fraud on Pay: 5 features
  step      what        when                          result
  --------  ----------  ----------------------------  -------------------
  read      spend       key customer                  slots 5..
  function  night(at)   python                        bool
  assign    challenger  unit customer, growthbook-v2  tree 0.25, xgb 0.75
  model     fraud@1     challenger = tree             decides
  model     fraud@2     challenger = xgb              decides
  model     shadow@3    always                        scores beside
  rule      burst       spend.count_1d > 30           review
  else                                                approve
  failure               a function or model fails     manual
  degraded              features cannot be known      manual
  features: amount, night, spend.count_1d, spend.count_36h, spend.mean_amount_7d
"""


def app(folder, text=APP, name="shop.py"):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_check_prints_the_plan(tmp_path, capsys):
    path = app(tmp_path)
    assert main(["check", path]) == 0
    plan = penstock.app.load_plan(path)
    out = capsys.readouterr().out
    assert out == CHECKED.format(name="shop", fingerprint=plan.fingerprint, layout=plan.stores[0].fingerprint)


def test_check_prints_every_problem_on_stderr(tmp_path, capsys):
    wrong = (
        APP.replace('"mean", "amount"', '"mean", "amuont"').replace("count_1d > 30", "count_1d >").replace("36h", "36y")
    )
    assert main(["check", app(tmp_path, wrong)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith('penstock: view "spend" aggregation 1: window: expected a length such as "90s"')
    assert lines[1] == "view \"spend\" aggregation 2: Pay has no field 'amuont'; did you mean amount?"
    assert lines[2].startswith('pipeline "fraud": rule "burst": ')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n\ny = 1 / 0\n", "app {path}, line 3: ZeroDivisionError: division by zero"),
        ("def f(:\n", "app {path}, line 1: invalid syntax"),
        ("import not_a_module_of_anyone\n", "app {path}, line 1: ModuleNotFoundError: No module named"),
        ("x = 1\n", "app shop: no FeatureView and no Pipeline; an app defines at least one"),
        (
            "from penstock import *\nclass E(Event, lateness='soon'):\n    at: Timestamp\n",
            'app {path}, line 2: TypeError: event E: lateness: expected a length such as "90s"',
        ),
    ],
)
def test_check_names_the_line_of_a_broken_file(tmp_path, capsys, text, said):
    path = app(tmp_path, text)
    assert main(["check", path]) == 1
    assert capsys.readouterr().err.startswith("penstock: " + said.format(path=path))


def test_check_compiles_native_functions(tmp_path, capsys):
    text = APP.replace('(mode="python")', "").replace("at.hour <= 6", "open('x')")
    text = text.replace('model=by_arm("challenger", tree="fraud@1", xgb="fraud@2"), models=["shadow@3"],', "")
    assert main(["check", app(tmp_path, text)]) == 1
    assert 'pipeline "fraud": function night' in capsys.readouterr().err


def test_check_with_models_binds_them(tmp_path, capsys):
    assert main(["check", app(tmp_path), "--models", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1 if i else 2].strip() for i, line in enumerate(lines)] == [
        "model fraud@1",
        "model fraud@2",
        "model shadow@3",
    ]


def test_check_of_what_is_not_there(capsys):
    for name, said in (
        ("nowhere.py", "app nowhere.py: no such file"),
        ("no_such_module", "app no_such_module: No module named 'no_such_module'"),
    ):
        assert main(["check", name]) == 1
        assert capsys.readouterr().err == f"penstock: {said}\n"


def test_usage(capsys):
    for arguments in ([], ["chekc"], ["check"], ["check", "a", "b"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert penstock.__version__ in capsys.readouterr().out


def run(*arguments, cwd):
    command = [sys.executable, *arguments]
    environment = {"PYTHONPATH": ENGINE, "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, env=environment)


def test_as_a_command_a_module_is_found_in_the_folder(tmp_path):
    app(tmp_path)
    done = run("-m", "penstock", "check", "shop", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("app shop: plan ")
    done = run("-m", "penstock", "check", "ship", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "penstock: app ship: No module named 'ship'\n")
    assert run("-c", "import penstock.cli, os; os.close(1); penstock.cli.main(['check', 'shop.py'])", cwd=tmp_path)


def test_importing_penstock_and_an_app_needs_no_heavy_library(tmp_path):
    """What a service that only defines, or only scores Structs, waits for."""
    heavy = "{'pyarrow', 'numba', 'llvmlite', 'onnxruntime', 'pandas', 'scipy', 'sklearn'}"
    text = f"import sys, penstock; assert not {heavy} & set(sys.modules); assert 'numpy' not in sys.modules;"
    plain = APP.replace('model=by_arm("challenger", tree="fraud@1", xgb="fraud@2"), models=["shadow@3"],', "")
    text += "e = penstock.Engine('plain.py');"
    text += "e.score({'id': 'a', 'customer': 'c', 'amount': 1.0, 'at': penstock.Timestamp.now()});"
    text += f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    app(tmp_path, plain, "plain.py")
    done = run("-c", text, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
