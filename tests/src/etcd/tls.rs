//! A certificate authority for one test, made by `openssl`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;
use tempfile::TempDir;

use crate::{netns::run, remains};

/// A certificate and its key, PEM files.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// The authority, a server's pair for 127.0.0.1, and a client's pair.
#[derive(Debug)]
pub struct Authority {
    directory: TempDir,
    server: Pair,
    client: Pair,
}

impl Authority {
    /// Makes all of them; the client's certificate names this user (its CN).
    ///
    /// # Errors
    ///
    /// Where openssl is missing.
    pub fn new(client: &str) -> Result<Self> {
        let directory = remains::directory("tls")?;
        let at = directory.path();
        let key = request(at, "ca", "loden test authority", &["-x509", "-days", "2"])?.key;
        let server =
            sign(at, &key, "server", "etcd", "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth")?;
        let client = sign(at, &key, "client", client, "extendedKeyUsage=clientAuth")?;
        Ok(Self { directory, server, client })
    }

    /// The authority's own certificate.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// For a server at 127.0.0.1.
    #[must_use]
    pub fn server(&self) -> &Pair {
        &self.server
    }

    /// Flags that make etcd hand out JWTs, signed by a key of this authority, instead of its own simple tokens.
    ///
    /// # Errors
    ///
    /// Where openssl is missing.
    pub fn jwt_flags(&self) -> Result<[String; 2]> {
        let path = |name: &str| self.directory.path().join(name).display().to_string();
        let (private, public) = (path("jwt.key"), path("jwt.pem"));
        run("openssl", &["genrsa", "-out", &private, "2048"])?;
        run("openssl", &["rsa", "-in", &private, "-pubout", "-out", &public])?;
        Ok([
            "--auth-token".to_owned(),
            format!("jwt,pub-key={public},priv-key={private},sign-method=RS256,ttl=10m"),
        ])
    }

    /// For a client.
    #[must_use]
    pub fn client(&self) -> &Pair {
        &self.client
    }
}

/// Makes a key and a request for a certificate, or with `-x509` the certificate itself.
fn request(at: &Path, name: &str, subject: &str, more: &[&str]) -> Result<Pair> {
    let pair = Pair { cert: at.join(format!("{name}.pem")), key: at.join(format!("{name}.key")) };
    let (cert, key) = (pair.cert.display().to_string(), pair.key.display().to_string());
    let subject = format!("/CN={subject}");
    let mut args = vec!["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    args.extend(["-keyout", &key, "-out", &cert, "-subj", &subject]);
    args.extend(more);
    run("openssl", &args)?;
    Ok(pair)
}

fn sign(at: &Path, authority: &Path, name: &str, subject: &str, extensions: &str) -> Result<Pair> {
    let pair = request(at, name, subject, &[])?;
    let path = |name: &str| at.join(name).display().to_string();
    let (request, cert, extension_file) =
        (path(&format!("{name}.csr")), path(&format!("{name}.pem")), path(&format!("{name}.ext")));
    fs::rename(&pair.cert, &request)?;
    fs::write(&extension_file, extensions)?;
    let mut args =
        vec!["x509", "-req", "-in", &request, "-out", &cert, "-days", "2", "-extfile", &extension_file];
    let (ca, key) = (path("ca.pem"), authority.display().to_string());
    args.extend(["-CA", &ca, "-CAkey", &key, "-CAcreateserial"]);
    run("openssl", &args)?;
    Ok(pair)
}
