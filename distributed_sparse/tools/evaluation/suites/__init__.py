"""suites: the suites by name."""

from distributed_sparse.tools.evaluation.suite import Suite
from distributed_sparse.tools.evaluation.suites.agreement import AgreementSuite
from distributed_sparse.tools.evaluation.suites.longbench import LongBenchSuite
from distributed_sparse.tools.evaluation.suites.needle import NeedleSuite
from distributed_sparse.tools.evaluation.suites.passkey import PasskeySuite
from distributed_sparse.tools.evaluation.suites.profile import ProfileSuite
from distributed_sparse.tools.evaluation.suites.recall import RecallSuite
from distributed_sparse.tools.evaluation.suites.ruler import RulerSuite

SUITES: dict[str, type[Suite]] = {
    suite.name: suite
    for suite in (RecallSuite, NeedleSuite, PasskeySuite, AgreementSuite, LongBenchSuite, RulerSuite, ProfileSuite)
}
