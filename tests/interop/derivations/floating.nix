# Outputs whose paths follow from their contents: with references to themselves, to each other, and to those of others.

let
  make = name: script: more:
    derivation ({
      inherit name;
      system = "x86_64-linux";
      builder = "/bin/sh";
      args = [ "-ec" script ];
      __contentAddressed = true;
      outputHashMode = "recursive";
      outputHashAlgo = "sha256";
    } // more);

  first = make "first" "mkdir $out; echo $out > $out/self; echo $dev > $out/dev; echo dev > $dev" {
    outputs = [ "out" "dev" ];
  };
  addressed = derivation {
    name = "addressed";
    system = "x86_64-linux";
    builder = "/bin/sh";
    args = [ "-ec" "cp -r ${first} $out" ];
  };
in
make "last" "cat ${first}/self ${first.dev} > $out; echo ${first} ${addressed} $out >> $out" { }
