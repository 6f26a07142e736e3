"""The application over fake engines: `import_path: tests.deployments.app.fake_application:build`."""

from ray.serve import Application

from deployments.app import assemble
from deployments.config import AppConfig
from tests.deployments.fakes import build_fake_engine


def build(args: AppConfig) -> Application:
    return assemble(args, build_fake_engine)
