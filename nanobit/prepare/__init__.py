import nanobit.cli  # noqa: F401 -- before any other package: it explains one that is missing
