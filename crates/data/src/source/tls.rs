//! Which certificates an `https://` client trusts, and what a failed handshake means.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::{CertificateError, Error as TlsError};
use ureq::tls::{parse_pem, Certificate, PemItem, RootCerts, TlsConfig};

use super::answer::Refusal;
use crate::error::{Error, Result};

/// Mozilla's list of authorities, and those in these PEM files.
pub(super) fn config(files: &[PathBuf]) -> Result<TlsConfig> {
    if files.is_empty() {
        return Ok(TlsConfig::default());
    }
    let public = webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter();
    let mut roots: Vec<Certificate<'static>> =
        public.map(|der| Certificate::from_der(der).to_owned()).collect();
    for path in files {
        let pem = std::fs::read(path).map_err(Error::io("read", path))?;
        let before = roots.len();
        for item in parse_pem(&pem) {
            let bad = |error: ureq::Error| {
                let reason = format!("it is not a PEM file of certificates: {error}");
                Error::option("root_certificates", path.display(), reason)
            };
            if let PemItem::Certificate(certificate) = item.map_err(bad)? {
                roots.push(certificate);
            }
        }
        if roots.len() == before {
            let reason =
                "no certificate (BEGIN CERTIFICATE) is in it: give the authority's own, as PEM";
            return Err(Error::option("root_certificates", path.display(), reason));
        }
    }
    Ok(TlsConfig::builder().root_certs(RootCerts::Specific(Arc::new(roots))).build())
}

/// What a failed handshake means, if it is one that asking again does not mend.
pub(super) fn refusal(error: &ureq::Error) -> Option<Refusal> {
    let cause = match error {
        ureq::Error::Rustls(cause) => cause,
        ureq::Error::Io(cause) => cause.get_ref()?.downcast_ref::<TlsError>()?,
        _ => return None,
    };
    let what_to_do = match cause {
        TlsError::InvalidCertificate(why) => match why {
            // Of an authority of the same name, or an earlier certificate of it.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "it is signed by nobody whom this program trusts: if that is an authority of your own, name its certificate in HttpOptions::root_certificates"
            }
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => {
                "check this machine's clock, or have the certificate renewed"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "use the name in the address that the certificate is for"
            }
            _ => "have the server's certificate put right",
        },
        TlsError::NoCertificatesPresented => "have a certificate given to the server",
        TlsError::PeerIncompatible(_) => "the server must speak TLS 1.2 or 1.3",
        TlsError::InvalidMessage(_) => "the server does not speak TLS there: check the port, or whether it is http://",
        _ => return None,
    };
    Some(Refusal::Never(format!("no trust in the server: {cause}; {what_to_do}")))
}
