"""Memory that ends: the event is refused with an error that says so, in every store or in none, and others go on."""

import subprocess
import sys

import pytest

# A store of many entities with room left in their chunks, and one of a single entity that needs more: the second cannot
# take an event that the first could. Data may grow by little (RLIMIT_DATA), so that the state cannot.
PROGRAM = """
import resource, sys
from penstock import Aggregation, Engine, EngineError, Event, FeatureView, Timestamp

class Payment(Event):
    customer: str
    terminal: str
    amount: float
    note: str
    at: Timestamp

def view(name, entity, functions):
    return FeatureView(name, entity=entity, source=Payment, aggregations=[
        Aggregation(function, column, windows=["1d"]) for function, column in functions
    ])

many = [("count", None), ("sum", "amount")]
functions = many + [("max", "amount"), ("distinct_count", "note"), ("var_pop", "amount")]
by_customer = view("by_customer", "customer", many if sys.argv[1] == "plain" else functions)
by_terminal = view("by_terminal", "terminal", functions)
engine = Engine({"Payment": Payment, "by_customer": by_customer, "by_terminal": by_terminal})
now = Timestamp.now()

def send(i, key):
    note = "n" if sys.argv[1] == "plain" else f"{i}" * (i % 90)
    engine.ingest(Payment(customer=f"c{key}", terminal="t", amount=10.0 ** (i % 600 - 300), note=note, at=now))

ENTITIES = 3000
for i in range(ENTITIES):
    send(1, i)
with open("/proc/self/status") as stream:
    data = next(int(line.split()[1]) for line in stream if line.startswith("VmData")) << 10
resource.setrlimit(resource.RLIMIT_DATA, (data + (2 << 20), resource.RLIM_INFINITY))
applied, refused = ENTITIES, 0
for i in range(200_000):
    try:
        send(i, i * 7919 % ENTITIES)
        applied += 1
    except EngineError as error:
        assert "memory" in str(error), error
        refused += 1
        if refused == 300:
            break
assert refused == 300
resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
stats = engine.stats()
assert [store["events"] for store in stats["stores"]] == [applied, applied], (stats, applied)
assert stats["outcomes"]["Payment"]["applied"] == applied
counted = sum(row["by_customer.count_1d"] for row in engine.features(
    "by_customer", [f"c{i}" for i in range(ENTITIES)]).rows)
assert counted == engine.features("by_terminal", ["t"]).rows[0]["by_terminal.count_1d"] == applied
send(1, 1)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private mappings on Linux only")
@pytest.mark.parametrize("kind", ["plain", "strings"])
def test_an_event_is_in_all_stores_or_in_none(kind):
    done = subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
