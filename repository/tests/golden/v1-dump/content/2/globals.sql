--
-- PostgreSQL database cluster dump
--

\restrict aYMnawPSaSsyB3ucN6kFRKyjga54Gv6mYSCncUAuub3hCuKJMoZXYPt7P8Ac1JO

SET default_transaction_read_only = off;

SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;

--
-- Roles
--

CREATE ROLE clerk;
ALTER ROLE clerk WITH NOSUPERUSER INHERIT NOCREATEROLE NOCREATEDB LOGIN NOREPLICATION NOBYPASSRLS;
CREATE ROLE postgres;
ALTER ROLE postgres WITH SUPERUSER INHERIT CREATEROLE CREATEDB LOGIN REPLICATION BYPASSRLS;
CREATE ROLE reader;
ALTER ROLE reader WITH NOSUPERUSER INHERIT NOCREATEROLE NOCREATEDB NOLOGIN NOREPLICATION NOBYPASSRLS;

--
-- User Configurations
--


--
-- Role memberships
--

GRANT reader TO clerk GRANTED BY postgres;






\unrestrict aYMnawPSaSsyB3ucN6kFRKyjga54Gv6mYSCncUAuub3hCuKJMoZXYPt7P8Ac1JO

--
-- PostgreSQL database cluster dump complete
--

