"""The application over fake engines, and over fake ranks where the engine has several:
`import_path: tests.deployments.app.fake_application:build`."""

from ray.serve import Application

from deployments.app import assemble
from deployments.config import AppConfig
from tests.cluster.shards.fake_ranks import load_fake
from tests.deployments.fakes import build_fake_engine


def build(args: AppConfig) -> Application:
    return assemble(args, build_fake_engine, load_fake)
