"""An app for the tests of the pool: the same event scored at once, and by a model of some ms a row."""

from penstock import Aggregation, Event, FeatureView, Model, Pipeline, Timestamp


class Ask(Event):
    customer: str
    n: int
    at: Timestamp


asked = FeatureView(
    "asked",
    entity="customer",
    source=Ask,
    include_request_event=True,
    aggregations=[Aggregation("count", windows=["1d"])],
)

fast = Pipeline("fast", event=Ask, features=["n", asked])
dense = Pipeline("dense", event=Ask, features=["n", asked], model=Model("dense@1", inputs=["n", "asked.count_1d"]))
