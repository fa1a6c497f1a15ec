//! TLS as libpq's `sslmode` words define it, by rustls with aws-lc-rs. No certificate revocation lists.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore,
    SignatureScheme,
};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::error::Error;

/// How much a connection must prove before a password is sent over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Never TLS.
    Disable,
    /// TLS where the server offers it, no proof who answers.
    #[default]
    Prefer,
    /// TLS, no proof who answers; with a root certificate given, like `verify-ca` (as libpq does).
    Require,
    /// TLS with a certificate from a known authority.
    VerifyCa,
    /// TLS with a certificate from a known authority for the host's name.
    VerifyFull,
}

/// What `sslrootcert` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Roots {
    /// The authorities in a PEM file.
    File(PathBuf),
    /// The authorities this system trusts.
    System,
}

/// TLS settings of a target.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// `sslmode`.
    pub mode: Mode,
    /// `sslrootcert`.
    pub roots: Option<Roots>,
    /// `sslcert`, PEM.
    pub certificate: Option<PathBuf>,
    /// `sslkey`, PEM without passphrase.
    pub key: Option<PathBuf>,
    /// `sslnegotiation=direct`, PostgreSQL 17 and later.
    pub direct: bool,
}

/// Builds the connector. Reads the certificate files each time, so that a renewed certificate is used at once.
pub(crate) fn connector(options: &Options) -> Result<MakeRustlsConnect, Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = verifier(options, &provider)?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| target(format!("TLS cannot be set up: {error}")))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match (&options.certificate, &options.key) {
        (Some(certificate), Some(key)) => {
            let key = PrivateKeyDer::from_pem_file(key).map_err(|error| {
                target(format!("sslkey {} is not a PEM key: {error}", key.display()))
            })?;
            builder.with_client_auth_cert(certificates(certificate, "sslcert")?, key).map_err(
                |error| target(format!("sslcert and sslkey do not work together: {error}")),
            )?
        }
        (None, None) => builder.with_no_client_auth(),
        (Some(_), None) => return Err(target("sslcert is given without sslkey".to_owned())),
        (None, Some(_)) => return Err(target("sslkey is given without sslcert".to_owned())),
    };
    if options.direct {
        config.alpn_protocols = vec![b"postgresql".to_vec()];
    }
    Ok(MakeRustlsConnect::new(config))
}

fn target(what: String) -> Error {
    Error::Target { what }
}

fn verifier(
    options: &Options,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ServerCertVerifier>, Error> {
    let anyone: Arc<dyn ServerCertVerifier> = Arc::new(Anyone { provider: Arc::clone(provider) });
    let (check_name, roots) = match (options.mode, &options.roots) {
        (Mode::Disable | Mode::Prefer, _) | (Mode::Require, None) => return Ok(anyone),
        (Mode::Require | Mode::VerifyCa, Some(Roots::File(path))) => (false, roots_of_file(path)?),
        (Mode::VerifyFull, Some(Roots::File(path))) => (true, roots_of_file(path)?),
        (Mode::VerifyFull, Some(Roots::System)) => (true, system_roots()?),
        // Anybody gets a certificate for a name of their own from a public authority.
        (_, Some(Roots::System)) => {
            return Err(target("sslrootcert=system needs sslmode=verify-full".to_owned()));
        }
        (Mode::VerifyCa | Mode::VerifyFull, None) => {
            return Err(target(
                "sslmode asks for a verified certificate: give sslrootcert, a PEM file or the word system".to_owned(),
            ));
        }
    };
    let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .build()
        .map_err(|error| target(format!("sslrootcert cannot be used: {error}")))?;
    Ok(if check_name { chain } else { Arc::new(AnyName { chain }) })
}

fn certificates(path: &Path, keyword: &str) -> Result<Vec<CertificateDer<'static>>, Error> {
    let wrong = |why: String| target(format!("{keyword} {} is not PEM: {why}", path.display()));
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| wrong(error.to_string()))?;
    if certificates.is_empty() {
        return Err(wrong("it holds no certificate".to_owned()));
    }
    Ok(certificates)
}

fn roots_of_file(path: &Path) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, "sslrootcert")? {
        roots.add(certificate).map_err(|error| {
            target(format!("sslrootcert {} cannot be used: {error}", path.display()))
        })?;
    }
    Ok(roots)
}

fn system_roots() -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        return Err(target(
            "sslrootcert=system: this system has no trusted certificates".to_owned(),
        ));
    }
    Ok(roots)
}

/// `sslmode=prefer` and `require`: encrypts against listeners, proves nothing about who answers.
#[derive(Debug)]
struct Anyone {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// `sslmode=verify-ca`: a known authority, any name.
#[derive(Debug)]
struct AnyName {
    chain: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        // The chain is verified before the name, so a wrong name means that all the rest was right.
        match self.chain.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        ) {
            Err(TlsError::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
