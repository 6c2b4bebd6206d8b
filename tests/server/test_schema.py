"""Whatever a request of the described shape, or near it, holds: no 500, and every response as /openapi.json says."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance, unsupported_method

from edgemistral.server import create_app
from tests.serving import HTTP, fake_model, serving, wait_for

APP = create_app(lambda: fake_model(context=48), queue=1000)
schema = schemathesis.openapi.from_dict(APP.openapi(), config=SchemathesisConfig.from_dict({
    "phases": {"coverage": {"enabled": False}},      # it tries every limit: some are millions of characters
    # A body that breaks a limit may be too large to be looked at: 413.
    "checks": {"negative_data_rejection": {"expected-statuses": ["400", "404", "405", "413", "415", "422"]}},
}))
# A request that fits may still be refused: a grammar that is none, ids outside the vocabulary, a prompt that is too long.
# And a POST that is not JSON is a 415 before anybody asks whether its path takes one.
NOT_CHECKED = [positive_data_acceptance, unsupported_method]


@pytest.fixture(scope="module")
def url():
    with serving(APP) as url:
        wait_for(lambda: HTTP.get(f"{url}/health").status_code == 200)
        assert HTTP.get(f"{url}/openapi.json").json() == APP.openapi()
        yield url


@schema.parametrize()
@hypothesis.settings(
    max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
def test_every_response_is_as_described(case, url):
    case.call_and_validate(base_url=url, excluded_checks=NOT_CHECKED)
