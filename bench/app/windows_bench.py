"""The app of the windows row: 3 windows x 4 aggregations of one column, as of each event, and no model."""

from penstock import Aggregation, Event, FeatureView, Pipeline, Timestamp

WINDOWS = ["1m", "1h", "24h"]


class Sample(Event):
    key: str
    value: float
    at: Timestamp


activity = FeatureView(
    "activity",
    entity="key",
    source=Sample,
    include_request_event=True,
    aggregations=[
        Aggregation("count", windows=WINDOWS),
        Aggregation("sum", "value", windows=WINDOWS),
        Aggregation("mean", "value", windows=WINDOWS),
        Aggregation("max", "value", windows=WINDOWS),
    ],
)

windows = Pipeline("windows", event=Sample, features=[activity])
