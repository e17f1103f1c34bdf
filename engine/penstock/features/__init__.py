"""Online features: the state that views are read from, and where it lives (hot path in penstock._ext.windows).

The one thing that must stay true: a read is a function of (T, K) alone: of the events applied before K with event time
<= T, in the order S6. It never depends on arrival order, on history, or on where the state lies.

Words
    event       one applied row: event time, the columns the views use, and which `where=` predicates were TRUE
    entity      a key, string or integer; 1 and "1" are different
    store       the state of one (event type, entity type), shared by all its views
    blob        one entity's state in a store: header, tails, cells, ring
    ring        the entity's events in event-time order, equal times in arrival order, in chunks of up to 4 KiB
    cell        one (column, where) pair
    tail        one distinct left edge: the first event of the ring inside the window; shared by every output with it
    lane        the exact sums of a cell: the total of everything ever applied, and per tail what it has passed
    group       the outputs of one view; a read fills one group
    as_of, T    the time a read is as of; the window is T-W < t <= T (closed="right")
    watermark   the largest event time applied; lateness: how far before it events and reads are still admitted
    stale       an entity whose newest event no admissible read can reach: unknown to reads, whether released yet or not
    version     events ever applied to an entity: what a logged score names as K
    request event  an event that counts in its own features without being applied

Invariants, each a test in tests/ext/test_windows*.py
    every output of every read equals the slow oracle's (tests/oracles/windows.py), bit for bit
    any arrival order within lateness gives the same bits once everything is in (ties keep their order)
    a read at an older T, or with a request event, leaves no trace in later reads
    a request event gives what apply-then-read gives
    eviction leaves no residue: sums are exact integers, rounded once on read
    a refused event, or one without memory, changes nothing
    a copy of the mapping at another address reads, and goes on, in the same way
    no read tells when sweep ran; what a stale entity held is gone once an event comes again
    an erased entity leaves nothing behind, and no other entity changes
    events beyond longest window + lateness leave the ring; idle entities are released in small steps; Lifetime stays
"""
