"""The suites that come with nev, as YAML (`nev.eval.suite.schema` reads them)."""
