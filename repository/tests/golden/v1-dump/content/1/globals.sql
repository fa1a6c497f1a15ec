--
-- PostgreSQL database cluster dump
--

\restrict 6aotzzAvrVoPe3VfaiLRD7tcaUdEcf7hvxpuc76siCfPJoxFBO27BdVRzU7SGDM

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






\unrestrict 6aotzzAvrVoPe3VfaiLRD7tcaUdEcf7hvxpuc76siCfPJoxFBO27BdVRzU7SGDM

--
-- PostgreSQL database cluster dump complete
--

