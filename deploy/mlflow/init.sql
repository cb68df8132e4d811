-- PostgreSQL's image runs this once, on an empty volume. Users and their rights have a database of their own.
CREATE DATABASE mlflow_auth;
