import pytest

# Not named test_*: pytest would leave their asserts without an explanation.
pytest.register_assert_rewrite(
    "observers.contract_suite",
    "observers.part_construction",
    "observers.part_input",
    "observers.part_statistics",
    "observers.rig",
    "observers.samples",
)
